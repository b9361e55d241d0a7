"""Read a manifest as its platform's own tool reads it, and print what is wrong with it.

    .venv-deploy/bin/python tests/deploy/check.py KIND FILE...

It runs in the environment of the tools, not in that of wanflow: `make deploy-tools` makes it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

SCHEMAS = Path(__file__).parent / "schemas"


def main(kind: str, *files: str) -> int:
    problems = [f"{file}: {problem}" for file in files for problem in KINDS[kind](Path(file))]
    print("\n".join(problems))
    return bool(problems)


def against(schema: dict[str, Any], document: Any) -> Iterator[str]:
    """What a JSON schema finds in a document."""
    for error in validator_for(schema, Draft202012Validator)(schema).iter_errors(document):
        yield f"{error.json_path}: {error.message}"


def lost(given: Any, taken: Any, place: str = "$") -> Iterator[str]:
    """What a model did not take of what it was given: keys that it does not know."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(taken, dict) or key not in taken:
                yield f"{place}.{key}: unknown key"
            else:
                yield from lost(value, taken[key], f"{place}.{key}")
    elif isinstance(given, list):
        for number, value in enumerate(given):
            yield from lost(value, taken[number], f"{place}[{number}]")
    elif given != taken:
        yield f"{place}: {given!r} became {taken!r}"


class ComposeLoader(yaml.SafeLoader):
    """YAML with the tags of compose, which say how files are merged."""


for tag in ("!reset", "!override"):
    ComposeLoader.add_constructor(
        tag,
        lambda loader, node: (
            loader.construct_sequence(node)
            if isinstance(node, yaml.SequenceNode)
            else loader.construct_mapping(node)
        ),
    )


def compose(file: Path) -> Iterator[str]:
    """By the specification's own schema, which check-jsonschema carries."""
    from check_jsonschema.builtin_schemas import get_builtin_schema

    document = yaml.load(file.read_text("utf-8"), ComposeLoader)
    yield from against(get_builtin_schema("vendor.compose-spec"), document)


def keda(file: Path) -> Iterator[str]:
    """Every object of KEDA in a rendered stream, by the schemas of its CRDs."""
    found = 0
    for document in yaml.safe_load_all(file.read_text("utf-8")):
        if str(document["apiVersion"]).startswith("keda.sh/"):
            found += 1
            schema = SCHEMAS / f"keda-{document['kind'].lower()}.json"
            yield from against(json.loads(schema.read_text("utf-8")), document)
    if not found:
        yield "no object of KEDA"


def skypilot(file: Path) -> Iterator[str]:
    """By SkyPilot's parser, which touches no cloud."""
    os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
    logging.disable()
    import sky

    try:
        task = sky.Task.from_yaml(str(file))
        clouds = sorted(str(each.cloud) for each in task.resources)
    except (ValueError, sky.exceptions.InvalidSkyPilotConfigError) as wrong:
        yield str(wrong)
        return
    if set(clouds) != {"AWS", "GCP", "Azure", "Kubernetes"}:
        yield f"runs on {', '.join(sorted(set(clouds)))}"


def eas(file: Path) -> Iterator[str]:
    """By the SDK, which takes the service as one string, and by what PAI-EAS documents of it."""
    from alibabacloud_eas20210701.models import CreateServiceRequest

    text = file.read_text("utf-8")
    given = {"body": text}
    yield from lost(given, CreateServiceRequest().from_map(given).to_map())
    yield from against(json.loads((SCHEMAS / "eas.json").read_text("utf-8")), json.loads(text))


def dlc(file: Path) -> Iterator[str]:
    """By the SDK's model of CreateJob."""
    from alibabacloud_pai_dlc20201203.models import CreateJobRequest

    given = json.loads(file.read_text("utf-8"))
    request = CreateJobRequest().from_map(given)
    request.validate()
    yield from lost(given, request.to_map())


def tione(model: str) -> Callable[[Path], Iterator[str]]:
    """By the SDK's model of an action."""

    def check(file: Path) -> Iterator[str]:
        from tencentcloud.tione.v20211111 import models

        given = json.loads(file.read_text("utf-8"))
        request = getattr(models, model)()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown keys, which `lost` names with their place
            request._deserialize(given)
        yield from lost(given, request._serialize())

    return check


def gongji(file: Path) -> Iterator[str]:
    """By what the Open API of 共绩算力 documents; it publishes no SDK."""
    schema = json.loads((SCHEMAS / "gongji.json").read_text("utf-8"))
    yield from against(schema, json.loads(file.read_text("utf-8")))


KINDS: dict[str, Callable[[Path], Iterator[str]]] = {
    "compose": compose,
    "keda": keda,
    "skypilot": skypilot,
    "eas": eas,
    "dlc": dlc,
    "tione-service": tione("CreateModelServiceRequest"),
    "tione-task": tione("CreateTrainingTaskRequest"),
    "gongji": gongji,
}

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
