#!/usr/bin/env bash
# Install what slow tests talk to, where it is missing: a Postgres server, a Chromium browser, and
# systemd's own check of units.
# On Debian and Ubuntu, as root or with sudo; elsewhere it says what to install by hand.
set -euo pipefail
postgres() { command -v initdb || ls /usr/lib/postgresql/*/bin/initdb; }
wanted=()
postgres >/dev/null 2>&1 || wanted+=(postgresql)
command -v chromium >/dev/null || command -v google-chrome >/dev/null || wanted+=(chromium)
command -v systemd-analyze >/dev/null || wanted+=(systemd)
[ ${#wanted[@]} -gt 0 ] || exit 0
if ! command -v apt-get >/dev/null; then
  echo "install ${wanted[*]} with this system's package manager; tests that need them fail without" >&2
  exit 1
fi
root=(); [ "$(id -u)" = 0 ] || root=(sudo)
export DEBIAN_FRONTEND=noninteractive
"${root[@]}" apt-get update -q
"${root[@]}" apt-get install -q -y --no-install-recommends "${wanted[@]}"
