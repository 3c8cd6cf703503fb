"""The planner's prediction of peak memory against what a run allocated."""

from __future__ import annotations

from benchmarks.gpu.rows import Figure, Probe
from benchmarks.loops import Run, resolved_recipe

TOLERANCE = 0.15


def compare(probe: Probe, name: str, run: Run, peak_gib: float | None) -> None:
    """A figure: predicted over allocated. ``peak_gib`` is None on the CPU, where only the planner runs."""
    from pipeline.memory.plan import plan_memory

    def measure() -> Figure:
        plan = plan_memory(resolved_recipe(run.recipe, run.sets))
        predicted = plan.peak_bytes / 2**30
        detail = {"predicted_gib": predicted, "peak_gib": peak_gib, "phase": plan.phase}
        if peak_gib is None:
            return Figure("predicted only", detail=detail)
        off = abs(predicted / peak_gib - 1)
        return Figure(off, "rel", TOLERANCE, at_most=True, detail=detail)

    probe.figure(f"{name}, planned against allocated memory", measure)
