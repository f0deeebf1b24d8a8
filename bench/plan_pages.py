"""Write the figures of `cpt plan` anew wherever they are quoted.

    python bench/plan_pages.py [recipes] [pages] [table]

    recipes   the comments of configs/gpt-oss-*.yaml, and memory and speed in README.md
    pages     docs/planning.md: 20b in parts, the published runs, the slice that an H100 measured
    table     docs/planning.md and docs/planning.svg: all layouts against GPUs (minutes)

To be run after bench/gpu_counts.py has counted again.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from plan_pages_parts.comparisons import in_parts, published, slices  # noqa: E402

from cpt.config import LaunchInfo, load, resolve  # noqa: E402
from cpt.model.configuration import load_config  # noqa: E402
from cpt.planning.estimate import Estimate, estimate  # noqa: E402
from cpt.planning.hardware import GPUS, Assumptions, Gpu  # noqa: E402
from cpt.planning.memory import GIB, counts_of  # noqa: E402

PAGE = ROOT / "docs" / "planning.md"
README = ROOT / "README.md"
README_RECIPE = ROOT / "configs" / "gpt-oss-20b.yaml"
CARDS = {
    "RTX 4090 24 GB": "rtx4090",
    "L40S 48 GB": "l40s",
    "H100 80 GB": "h100",
    "H200 141 GB": "h200",
}
"""Names of GPUs in the comments of recipes, and in the planner."""


def main() -> None:
    """Rewrite what is named on the command line; everything if nothing is."""
    wanted = sys.argv[1:] or ["recipes", "pages", "table"]
    if "recipes" in wanted:
        for path in sorted((ROOT / "configs").glob("gpt-oss-*.yaml")):
            if "By cpt plan" in path.read_text(encoding="utf-8"):
                rewrite_recipe(path)
        rewrite_readme()
    if "pages" in wanted:
        for mark, text in (("parts", in_parts()), ("published", published()), ("slice", slices())):
            replace_between(PAGE, mark, text)
    if "table" in wanted:
        replace_between(PAGE, "table", cost_table())


def of_recipe(path: Path) -> Estimate:
    """Estimate a recipe on the GPUs that its comment names."""
    comment = path.read_text(encoding="utf-8").split("\nmodel:")[0]
    nodes = re.search(r"--num_nodes (\d+) --num_gpus 8", comment)
    world_size = 8 * int(nodes[1]) if nodes else 8
    if "--num_gpus 1 " in comment:
        world_size = 1
    model = load_config(None, found_in(r"(gpt-oss-\d+b)", comment))
    run, engine = load(path, ROOT / found_in(r"--ds_config (\S+)", comment), {})
    info = LaunchInfo(world_size=world_size, local_world_size=min(8, world_size))
    config = resolve(run, engine, model, info)
    return estimate(config, model, counts_of(run, model), card_of(comment), Assumptions())


def card_of(comment: str) -> Gpu:
    """Return the GPU that a recipe's comment names."""
    return GPUS[CARDS[found_in(r"By cpt plan for (.+?), computed", comment.replace("\n# ", " "))]]


def found_in(pattern: str, text: str) -> str:
    """Return what a pattern finds."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"nothing like {pattern} in {text[:200]!r}")
    return found[1]


def rewrite_recipe(path: Path) -> None:
    """Write memory and speed of a recipe into its comment."""
    one = of_recipe(path)
    text = path.read_text(encoding="utf-8")
    memory = f"{sum(one.memory.values()) / GIB:.1f} GiB of"
    text = re.sub(r"[\d.]+ GiB of", memory, text, count=1)
    on_host = f"{sum(one.host.values()) / GIB:.0f} GiB of host"
    text = re.sub(r"[\d.]+ GiB of host", on_host, text, count=1)
    speed = (
        f"# {one.tokens_per_gpu_second:,.0f} tokens/s/GPU with balanced routing; "
        f"bottleneck {one.bottleneck}"
    )
    text = re.sub(r"# [\d,]+ tokens/s/GPU with .*bottleneck \w+", speed, text, count=1)
    path.write_text(text, encoding="utf-8")


def rewrite_readme() -> None:
    """Write memory and speed of the first recipe into README.md."""
    one = of_recipe(README_RECIPE)
    train = one.config.train
    hours = one.step_seconds * train.total_steps / 3600
    tokens = train.global_batch_size * train.seq_len
    steps = f"{train.total_steps:,} steps"
    filled = f"| GPU memory | {sum(one.memory.values()) / GIB:.1f} GiB of"
    row = (
        f"| speed | {one.tokens_per_gpu_second:,.0f} tokens/s for each GPU with balanced routing "
        f"({one.mfu(GPUS['h100']):.0%} of the peak): {one.step_seconds:.1f} s for a step of "
        f"{tokens:,} tokens, {hours:.1f} hours for the {steps} of the recipe |\n"
    )
    text = README.read_text(encoding="utf-8")
    text = re.sub(r"\| GPU memory \| [\d.]+ GiB of", filled, text, count=1)
    README.write_text(re.sub(r"\| speed \| .*\n", row, text, count=1), encoding="utf-8")


def replace_between(path: Path, mark: str, text: str) -> None:
    """Put a text between the two comments that carry a mark."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    head, rest = path.read_text(encoding="utf-8").split(begin)
    _, tail = rest.split(end)
    path.write_text(f"{head}{begin}\n\n{text.rstrip()}\n\n{end}{tail}", encoding="utf-8")


def cost_table() -> str:
    """Return the table of layouts against GPUs, and draw it."""
    command = [sys.executable, "-m", "cpt.cli", "plan", "--gpu", "h100"]
    command += ["--config", "configs/gpt-oss-20b.yaml", "--ds_config", "ds_configs/z3_ep.json"]
    command += ["--gpus", "8", "16", "32", "64", "512", "--seq_len", "4096", "32768", "131072"]
    command += ["--model", "gpt-oss-20b", "gpt-oss-120b", "--batch_tokens", str(2**22)]
    command += ["--plot", "docs/planning.svg"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rows = []
    for line in printed.splitlines():
        if line.startswith(("  model ", "  gpt-oss-")):
            rows.append(f"  {line}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
