"""The files that the guard keeps of the untouched model: a run that goes on needs them."""

from __future__ import annotations

from pathlib import Path

from cpt.guard.baseline import BASELINE_FILE, missing_baseline
from cpt.guard.generation.untouched import missing_untouched, untouched_file
from cpt.guard.traces.store import TRACE_FOLDER, TraceFolder, missing_traces
from data_pipeline.config.mix_config import MixConfig


def missing_files(run_dir: Path, mix: MixConfig, step: int, *, has_held_out: bool) -> list[str]:
    """Return the problems of a run that goes on without what was kept of the untouched model.

    Args:
        run_dir: The run directory.
        mix: The mix; it says what the guard looks at.
        step: Optimizer steps done; at 0 the untouched model can still be measured.
        has_held_out: Whether the data holds out text.
    """
    if step == 0:
        return []
    folder = run_dir / "guard"
    problems = []
    baseline = folder / BASELINE_FILE
    if has_held_out and not baseline.is_file():
        problems += missing_baseline(baseline, step).problems
    replies = [untouched_file(folder, domain.name) for domain in mix.guard.generation]
    if replies and not any(file.is_file() for file in replies):
        problems += missing_untouched(replies[0], step).problems
    kept = TraceFolder(folder / TRACE_FOLDER)
    traces = [kept.traces_file(domain.name) for domain in mix.guard.traces]
    if traces and not any(file.is_file() for file in traces):
        problems += missing_traces(traces[0], step).problems
    return problems
