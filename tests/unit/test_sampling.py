"""Schedules and solvers beside the golden numbers: published timesteps, states as values, order of
accuracy, refusals.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wanflow.config import SOLVERS, RequestError, Solver
from wanflow.presets import T2V_A14B
from wanflow.sampling.guidance import guide
from wanflow.sampling.schedule import Schedule, Step, make_schedule, snr
from wanflow.sampling.solvers import SolverState, Velocity, advance, order
from wanflow.sampling.timeline import expert_at, expert_per_step

STEPS = (1, 2, 3, 4, 10, 40, 50, 92, 100, 1000)
SHIFTS = (0.3, 1.0, 3.0, 5.0, 8.0, 12.0, 17.3, 100.0)


def run(
    schedule: Schedule, state: SolverState, velocity: Velocity, until: int | None = None
) -> SolverState:
    for _ in range(state.index, len(schedule) if until is None else until):
        state = advance(schedule, state, velocity)
    return state


def noise(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 2, 4, 4), generator=torch.Generator().manual_seed(4))


def wavy(x: Tensor, step: Step) -> Tensor:
    """A velocity that depends on the sample, on all that a step tells, and not linearly."""
    return torch.tanh(x * (1 + step.sigma)) + 0.3 * math.cos(step.timestep / 70) + 0.01 * step.index


# --- schedules ---


def test_four_euler_steps_at_shift_5() -> None:
    """What distilled models are run with."""
    schedule = make_schedule("euler", 4, 5.0)
    assert schedule.timesteps == pytest.approx((1000, 937.5, 2500 / 3, 625), abs=1e-9)
    assert schedule.sigmas == pytest.approx((1, 0.9375, 5 / 6, 0.625, 0), abs=1e-7)


@pytest.mark.parametrize(("shift", "high", "low"), [(12.0, 26, 14), (5.0, 17, 23), (3.0, 12, 28)])
@pytest.mark.parametrize("solver", ["unipc"])
def test_expert_split_of_40_steps(solver: Solver, shift: float, high: int, low: int) -> None:
    chosen = expert_per_step(make_schedule(solver, 40, shift), T2V_A14B.experts)
    assert (chosen.count("high"), chosen.count("low")) == (high, low)
    assert (
        list(chosen) == ["high"] * high + ["low"] * low
    )  # one change of expert, from noise to detail


def test_expert_changes_at_the_boundary_itself() -> None:
    at = T2V_A14B.experts_at
    assert [expert_at(t, at(0.875)) for t in (874.999, 875, 875.001)] == ["low", "high", "high"]
    assert (
        expert_at(0, at(0.0)) == "high"
        and expert_at(1000, at(1.0)) == "high"
        and expert_at(999, at(1.0)) == "low"
    )


def test_signal_to_noise_at_the_boundary() -> None:
    assert snr(0.875) == pytest.approx(1 / 49)
    assert snr(1.0) == 0 and snr(0.0) == math.inf and snr(0.5) == 1
    falling = [snr(sigma / 100) for sigma in range(101)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(("steps", "shift"), list(itertools.product(STEPS, SHIFTS)))
@pytest.mark.parametrize("solver", SOLVERS)
def test_sigmas_fall(solver: Solver, steps: int, shift: float) -> None:
    schedule = make_schedule(solver, steps, shift)
    assert len(schedule) == len(schedule.timesteps) == steps == len(schedule.sigmas) - 1
    assert all(a > b for a, b in itertools.pairwise(schedule.sigmas))
    assert all(a >= b for a, b in itertools.pairwise(schedule.timesteps))
    assert (
        schedule.sigmas[-1] == 0 and schedule.sigmas[0] <= 1 and 0 < schedule.timesteps[0] <= 1000
    )
    assert (
        list(schedule.sigmas) == torch.tensor(schedule.sigmas).tolist()
    )  # float32 holds them exactly
    for index, (timestep, sigma) in enumerate(
        zip(schedule.timesteps, schedule.sigmas, strict=False)
    ):
        assert schedule.step(index) == Step(index, timestep, sigma)
        exact = timestep == pytest.approx(1000 * sigma, abs=1e-4)  # but for float32
        assert exact if solver == "euler" else exact or 0 < 1000 * sigma - timestep < 1 + 1e-4


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_model_is_told_whole_timesteps(solver: Solver) -> None:
    assert all(
        timestep == int(timestep)
        for steps in STEPS
        for timestep in make_schedule(solver, steps, 7.0).timesteps
    )


def test_unipc_from_92_steps() -> None:
    """Its first two timesteps coincide; the schedule is followed all the same, without skipping a
    sigma.
    """
    first, second = make_schedule("unipc", 92, 12.0).timesteps[:2]
    assert first == second == 999
    asked: list[Step] = []
    schedule = make_schedule("unipc", 92, 12.0)

    def record(x: Tensor, step: Step) -> Tensor:
        asked.append(step)
        return wavy(x, step)

    assert run(schedule, SolverState(0, noise()), record).x.isfinite().all()
    assert [step.sigma for step in asked] == list(schedule.sigmas[:-1])


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("solver", SOLVERS)
def test_bad_shift(solver: Solver, shift: float) -> None:
    with pytest.raises(RequestError, match="shift"):
        make_schedule(solver, 4, shift)


@pytest.mark.parametrize("steps", [0, -1])
@pytest.mark.parametrize("solver", SOLVERS)
def test_bad_steps(solver: Solver, steps: int) -> None:
    with pytest.raises(RequestError, match=f"{steps} steps"):
        make_schedule(solver, steps, 5.0)


@pytest.mark.parametrize(("solver", "shift"), [("heun", 5.0), ("unipc", math.inf)])
def test_bad_solver_and_shift(solver: Solver, shift: float) -> None:
    with pytest.raises(RequestError):
        make_schedule(solver, 4, shift)


# --- solvers ---


@pytest.mark.parametrize(
    ("steps", "orders"), [(1, [1]), (2, [1, 1]), (3, [1, 2, 1]), (4, [1, 2, 2, 1])]
)
def test_orders(steps: int, orders: list[int]) -> None:
    for solver in ("unipc", "dpm++"):
        schedule = make_schedule(solver, steps, 5.0)
        assert [order(schedule, index) for index in range(steps)] == orders


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_goes_straight_to_the_prediction(solver: Solver) -> None:
    schedule, x = make_schedule(solver, 1, 5.0), noise()
    state = run(schedule, SolverState(0, x), wavy)
    torch.testing.assert_close(
        state.x, x - schedule.sigmas[0] * wavy(x, schedule.step(0)), atol=1e-6, rtol=1e-6
    )
    assert state.x.dtype == torch.float32 and state.index == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_velocity_is_asked_once_a_step(solver: Solver) -> None:
    asked: list[Step] = []

    def record(x: Tensor, step: Step) -> Tensor:
        asked.append(step)
        return wavy(x, step)

    schedule = make_schedule(solver, 7, 5.0)
    run(schedule, SolverState(0, noise()), record)
    assert asked == [schedule.step(index) for index in range(7)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_low_precision_velocity_keeps_the_sample_float32(solver: Solver) -> None:
    state = run(
        make_schedule(solver, 5, 5.0),
        SolverState(0, noise()),
        lambda x, step: wavy(x, step).bfloat16(),
    )
    assert {value.dtype for value in state.tensors().values()} == {torch.float32}


@pytest.mark.parametrize("stop", range(9))
@pytest.mark.parametrize("solver", SOLVERS)
def test_stop_anywhere_and_go_on(solver: Solver, stop: int, tmp_path: Path) -> None:
    """Saved and loaded after any step, the run ends in the same bits."""
    schedule = make_schedule(solver, 8, 12.0)
    whole = run(schedule, SolverState(0, noise()), wavy)
    stopped = run(schedule, SolverState(0, noise()), wavy, stop)
    save_file(
        {key: value.contiguous() for key, value in stopped.tensors().items()},
        tmp_path / "state.safetensors",
    )
    loaded = SolverState.from_tensors(stop, load_file(tmp_path / "state.safetensors"))
    assert loaded.tensors().keys() == stopped.tensors().keys() and loaded.index == stopped.index
    ended = run(make_schedule(solver, 8, 12.0), loaded, wavy)
    assert ended.index == whole.index
    assert all(torch.equal(value, whole.tensors()[key]) for key, value in ended.tensors().items())


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_changes_no_state(solver: Solver) -> None:
    """The same state can be advanced twice, with the same result, and is not touched by it."""
    schedule = make_schedule(solver, 6, 5.0)
    state = run(schedule, SolverState(0, noise()), wavy, 3)
    kept = {key: value.clone() for key, value in state.tensors().items()}
    first, second = advance(schedule, state, wavy), advance(schedule, state, wavy)
    assert torch.equal(first.x, second.x)
    assert all(torch.equal(value, kept[key]) for key, value in state.tensors().items())


def test_history_is_short() -> None:
    for solver in SOLVERS:
        state = run(make_schedule(solver, 9, 5.0), SolverState(0, noise()), wavy)
        assert len(state.tensors()) <= 4


def test_guidance() -> None:
    cond, uncond = noise(3, 2), noise(3, 2) * -0.5
    assert torch.equal(guide(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 4.0), 4 * cond - 3 * uncond)


# --- accuracy, on data whose flow is known in closed form ---

MEAN, DEVIATION = 1.3, 0.6


def spread(sigma: float) -> float:
    """Standard deviation of (1 - sigma) data + sigma noise, the data being normal with MEAN and
    DEVIATION.
    """
    return math.hypot((1 - sigma) * DEVIATION, sigma)


def gaussian_velocity(x: Tensor, step: Step) -> Tensor:
    """E[noise - data | x], exactly."""
    s = step.sigma
    deviation = x - (1 - s) * MEAN
    return (s - (1 - s) * DEVIATION**2) / spread(s) ** 2 * deviation - MEAN


def gaussian_flow(x: Tensor, start: float, end: float) -> Tensor:
    """Where the flow takes x between two sigmas: the distance from the mean, counted in deviations,
    stays.
    """
    return (1 - end) * MEAN + spread(end) * (x - (1 - start) * MEAN) / spread(start)


def error(schedule: Schedule) -> float:
    x = noise(200).double()
    state = run(schedule, SolverState(0, x), gaussian_velocity)
    return float((state.x - gaussian_flow(x, schedule.sigmas[0], schedule.sigmas[-1])).abs().max())


def even_schedule(solver: Solver, steps: int) -> Schedule:
    """From sigma 0.9 to 0.1 in equal steps of lambda, without the last leap to 0, whose error is
    its own.
    """
    sigmas = tuple(1 / (1 + 9 ** (2 * index / steps - 1)) for index in range(steps + 1))
    return Schedule(solver, tuple(1000 * sigma for sigma in sigmas[:-1]), sigmas)


@pytest.mark.parametrize(("solver", "expected"), [("euler", 1), ("dpm++", 2), ("unipc", 2)])
def test_order_of_accuracy(solver: Solver, expected: int) -> None:
    """Doubling the steps divides the error by 2 to the solver's order."""
    errors = [error(even_schedule(solver, steps)) for steps in (40, 80, 160, 320)]
    assert all(a > b for a, b in itertools.pairwise(errors)), errors
    assert math.log2(errors[0] / errors[-1]) / 3 == pytest.approx(expected, abs=0.25), errors


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_error_falls_on_the_official_schedules(solver: Solver, shift: float) -> None:
    errors = [error(make_schedule(solver, steps, shift)) for steps in (40, 160, 640)]
    assert all(a > 1.25 * b for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < (5e-2 if solver == "euler" else 5e-3), errors


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
def test_second_order_beats_first(solver: Solver) -> None:
    assert error(make_schedule(solver, 20, 3.0)) < 0.2 * error(make_schedule("euler", 20, 3.0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_distribution_is_reached(solver: Solver) -> None:
    """Noise becomes data: mean and deviation of what 40 steps make of it."""
    made = run(make_schedule(solver, 40, 3.0), SolverState(0, noise(20000)), gaussian_velocity).x
    assert float(made.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(made.std()) == pytest.approx(DEVIATION, abs=0.05 if solver == "euler" else 0.01)


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
def test_constant_data_is_exact(solver: Solver) -> None:
    """Where every sample leads to one point, a solver that integrates the data prediction makes no
    error at any number of steps.
    """
    for steps in (1, 2, 3, 10):
        state = run(
            make_schedule(solver, steps, 5.0),
            SolverState(0, noise().double()),
            lambda x, step: (x - 0.7) / step.sigma,
        )
        torch.testing.assert_close(state.x, torch.full_like(state.x, 0.7), atol=1e-9, rtol=0)
