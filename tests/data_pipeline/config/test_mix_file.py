"""An impossible mix is refused with everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.config.mix_file import load_mix
from data_pipeline.errors import ConfigError

GOOD = """\
seq_len: 64
seed: 1
sources:
  - name: ja_web
    language: ja
    domain: web
    path: ja.jsonl
    weight: 0.5
    held_out_share: 0.1
  - name: en_web
    language: en
    domain: web
    path: [en/*.jsonl, en/c.parquet]
    weight: 0.5
guard:
  domains:
    - {name: japanese, language: ja, sources: [ja_web]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "en").mkdir()
    for name in ("ja.jsonl", "en/b.jsonl", "en/a.jsonl", "en/c.parquet", "odd.xyz"):
        (tmp_path / name).write_text("{}\n")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "mix.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_mix(write(folder, text))
    assert caught.value.exit_code == 78
    return [problem.removeprefix(f"{folder}/") for problem in caught.value.problems]


def changed(folder: Path, old: str, new: str) -> list[str]:
    assert old in GOOD
    return problems_of(folder, GOOD.replace(old, new, 1))


def test_a_good_mix_loads_with_absolute_sorted_files(folder: Path) -> None:
    mix = load_mix(write(folder, GOOD))
    assert (mix.name, mix.seq_len, mix.seed, mix.max_reject_share) == ("mix", 64, 1, 0.05)
    assert [path.name for path in mix.sources[1].files()] == ["a.jsonl", "b.jsonl", "c.parquet"]
    assert all(path.is_absolute() for source in mix.sources for path in source.files())


def test_loss_weights_that_mean_nothing_are_refused(folder: Path) -> None:
    for value in ("-0.5", ".inf", ".nan", "1e-310", "1e-7", "1e7", "1e308"):
        problems = changed(folder, "weight: 0.5\n", f"weight: 0.5\n    loss_weight: {value}\n")
        assert any("loss_weight" in problem for problem in problems), problems
    text = GOOD.replace("weight: 0.5\n", "weight: 0.5\n    loss_weight: 0\n")
    (problem,) = problems_of(folder, text)
    assert "nothing would be learned" in problem
    one = GOOD.replace("weight: 0.5\n", "weight: 0.5\n    loss_weight: 0\n", 1)
    assert [source.loss_weight for source in load_mix(write(folder, one)).sources] == [0.0, 1.0]


def test_sources_that_are_not_trained_on_do_not_count_as_learned(folder: Path) -> None:
    both = GOOD.replace("weight: 0.5\n", "weight: 1.0\n    loss_weight: 0\n", 1)
    (problem,) = problems_of(folder, both.replace("weight: 0.5\n", "weight: 0\n"))
    assert "sources trains on sources of loss_weight 0 alone" in problem


def test_a_phase_that_learns_nothing_is_refused(folder: Path) -> None:
    one = GOOD.replace("weight: 0.5\n", "weight: 0.5\n    loss_weight: 0\n", 1)
    schedule = (
        "schedule:\n  - {name: a, share: 0.5, weights: {ja_web: 1}}\n"
        "  - {name: b, share: rest, weights: {en_web: 1}}\n"
    )
    problems = problems_of(folder, one + schedule)
    assert ["schedule[0] trains on sources of loss_weight 0" in text for text in problems] == [True]


def test_paths_are_relative_to_the_mix_and_not_to_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, GOOD)
    monkeypatch.chdir(folder.parent)
    relative = load_mix(path.relative_to(folder.parent))
    assert relative.sources[0].files() == [folder / "ja.jsonl"]


def test_without_guard_domains_each_held_out_source_is_one(folder: Path) -> None:
    mix = load_mix(write(folder, GOOD[: GOOD.index("guard")]))
    assert [(d.name, d.language, d.sources) for d in mix.guard_domains()] == [
        ("ja_web", "ja", ("ja_web",))
    ]


def test_unknown_key_names_line_and_nearest_key(folder: Path) -> None:
    assert changed(folder, "held_out_share", "heldout_share")[0] == (
        "mix.yaml:9: sources[0].heldout_share is not a known key. Did you mean 'held_out_share'?"
    )


def test_duplicate_key_is_refused(folder: Path) -> None:
    assert changed(folder, "seed: 1", "seed: 1\nseed: 2") == [
        "mix.yaml:3: seed is given twice (first in line 2). Remove one."
    ]


@pytest.mark.case("G1", "language no is text, and unknown")
def test_language_no_is_text_and_unknown(folder: Path) -> None:
    assert changed(folder, "language: ja\n", "language: no\n")[0].startswith(
        "mix.yaml:5: sources[0].language is 'no', which is not known."
    )


@pytest.mark.case("G2", "unknown language with a suggestion")
def test_unknown_language_gets_a_suggestion(folder: Path) -> None:
    assert "Did you mean 'code'?" in changed(folder, "language: ja\n", "language: cod\n")[0]


@pytest.mark.case("G2", "negative weight refused")
def test_negative_weight_is_refused(folder: Path) -> None:
    assert changed(folder, "weight: 0.5", "weight: -0.1") == [
        "mix.yaml:8: sources[0].weight is -0.1, must be >= 0. "
        "Remove the source or give it a share of the tokens."
    ]


@pytest.mark.case("G2", "NaN weight refused")
def test_nan_weight_is_refused(folder: Path) -> None:
    assert changed(folder, "weight: 0.5", "weight: .nan") == [
        "mix.yaml:8: sources[0].weight is nan, must be a finite number."
    ]


@pytest.mark.case("G2", "all weights zero refused")
def test_weights_that_are_all_zero_are_refused(folder: Path) -> None:
    text = GOOD.replace("weight: 0.5", "weight: 0")
    assert problems_of(folder, text) == [
        "mix.yaml:3: sources have weights that are all 0. Give at least one a share of the tokens."
    ]


@pytest.mark.case("G2", "weights that do not sum to 1 shown with their sum and scaled")
def test_weights_that_do_not_sum_to_1_are_shown_with_their_sum_and_scaled(folder: Path) -> None:
    assert changed(folder, "weight: 0.5", "weight: 0.3") == [
        "mix.yaml:3: sources have weights that sum to 0.8, must be 1. "
        "Scaled to 1: ja_web 0.375, en_web 0.625."
    ]


def test_weights_within_rounding_of_1_are_taken(folder: Path) -> None:
    text = GOOD.replace("weight: 0.5", "weight: 0.5000004", 1)
    assert load_mix(write(folder, text)).sources[0].weight == 0.5000004


@pytest.mark.case("G2", "duplicate source refused")
def test_duplicate_source_name_is_refused(folder: Path) -> None:
    assert changed(folder, "name: en_web", "name: ja_web")[0] == (
        "mix.yaml:10: sources[1].name is 'ja_web', which line 4 uses, too. Give each its own name."
    )


@pytest.mark.parametrize("name", ["../up", "a/b", "Upper", "", "a b", "x" * 65])
def test_a_name_that_is_no_folder_name_is_refused(folder: Path, name: str) -> None:
    assert "sources[1].name is" in changed(folder, "name: en_web", f"name: '{name}'")[0]


@pytest.mark.case("G2", "missing path refused")
def test_missing_path_is_refused(folder: Path) -> None:
    assert changed(folder, "    path: ja.jsonl\n", "") == [
        "mix.yaml:4: sources[0].path is missing. Give a file, a glob, or a list of them."
    ]


def test_path_that_matches_nothing_is_refused_with_the_place_looked_in(folder: Path) -> None:
    assert changed(folder, "ja.jsonl", "jp/*.jsonl") == [
        f"mix.yaml:7: sources[0].path is 'jp/*.jsonl', which matches no file (looked in {folder})."
    ]


@pytest.mark.parametrize(("old", "new"), [("ja.jsonl", "[]"), ("[ja_web]", "[]")])
@pytest.mark.case("G2", "empty list refused")
def test_empty_list_is_refused(folder: Path, old: str, new: str) -> None:
    assert any("is an empty list" in problem for problem in changed(folder, old, new))


def test_no_sources_are_refused(folder: Path) -> None:
    assert problems_of(folder, "seq_len: 64\nseed: 1\nsources: []\n") == [
        "mix.yaml:3: sources is an empty list. Add at least one source."
    ]


def test_a_file_named_twice_is_refused(folder: Path) -> None:
    assert "names" in changed(folder, "en/c.parquet", "en/a.jsonl")[0]


def test_unknown_suffix_needs_a_format(folder: Path) -> None:
    assert "whose suffix is not one of" in changed(folder, "ja.jsonl", "odd.xyz")[0]
    load_mix(write(folder, GOOD.replace("path: ja.jsonl", "path: odd.xyz\n    format: jsonl")))


def test_mock_source_needs_its_keys_and_no_path(folder: Path) -> None:
    assert changed(folder, "path: ja.jsonl", "path: ja.jsonl\n    format: mock") == [
        "mix.yaml:7: sources[0].path is given, but format: mock reads no files. "
        "Remove one of the two.",
        "mix.yaml:4: sources[0].num_documents is missing. format: mock needs it.",
        "mix.yaml:4: sources[0].mean_tokens is missing. format: mock needs it.",
    ]


@pytest.mark.parametrize("seq_len", ["1", "131073", "-5"])
def test_seq_len_out_of_range_is_refused(folder: Path, seq_len: str) -> None:
    problem = changed(folder, "seq_len: 64", f"seq_len: {seq_len}")[0]
    assert f"seq_len is {seq_len}, must be from 2 to 131072" in problem


def test_holding_out_everything_needs_weight_0(folder: Path) -> None:
    problem = changed(folder, "held_out_share: 0.1", "held_out_share: 1.0")[0]
    assert "leaves nothing to train on" in problem


def test_guard_domain_over_unknown_or_unheld_source_is_refused(folder: Path) -> None:
    problem = changed(folder, "[ja_web]", "[ja_wb]")[0]
    assert (
        "guard.domains[0].sources[0] is 'ja_wb', which is no source. Did you mean 'ja_web'?"
        in problem
    )
    assert "which holds out nothing" in changed(folder, "[ja_web]", "[en_web]")[0]


GENERATION = """
  generation:
    - {name: maths, language: en, path: maths.jsonl, sources: [en_web]}
    - {name: chat, language: ja, path: chat.jsonl}
"""


@pytest.fixture
def asked(folder: Path) -> Path:
    """Return the folder with files of prompts."""
    (folder / "maths.jsonl").write_text('{"prompt": "1 + 1?", "answer": 2}\n')
    (folder / "chat.jsonl").write_text('{"prompt": "Hello"}\n')
    return folder


def test_prompts_are_read_with_absolute_paths(asked: Path) -> None:
    mix = load_mix(write(asked, GOOD + GENERATION))
    maths, chat = mix.guard.generation
    assert maths.path == str(asked / "maths.jsonl") and maths.sources == ("en_web",)
    assert chat.prompts_per_look == 300 and chat.effort == "medium"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("[en_web]", "[en_wb]", "sources[0] is 'en_wb', which is no source. Did you mean"),
        ("[en_web]", "[en_web, en_web]", "sources[1] is 'en_web', which the list already has."),
        ("name: chat", "name: maths", "name is 'maths', which line 20 uses, too."),
        ("name: chat", "name: japanese", "which a domain of held-out text has, too."),
        ("language: ja, path: chat", "language: jp, path: chat", "is 'jp', which is not known."),
        ("chat.jsonl", "none.jsonl", "none.jsonl: cannot be read: No such file"),
        ("chat.jsonl", "ja.jsonl", "ja.jsonl:1: 'prompt' is missing"),
        ("path: chat.jsonl", "path: chat.jsonl, prompts_per_look: 0", "must be at least 1"),
        ("path: chat.jsonl", "path: chat.jsonl, hard_limit_points: 1", "at most hard_limit_points"),
        ("path: chat.jsonl", "path: chat.jsonl, efort: low", "Did you mean 'effort'?"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(
    asked: Path, old: str, new: str, problem: str
) -> None:
    assert old in GENERATION
    found = problems_of(asked, GOOD + GENERATION.replace(old, new, 1))
    assert any("guard.generation[" in one and problem in one for one in found), found


def test_files_of_prompts_need_not_be_here_for_a_whole_build(asked: Path) -> None:
    path = write(asked, GOOD + GENERATION)
    (asked / "chat.jsonl").unlink()
    assert len(load_mix(path, need_files=False).guard.generation) == 2


def test_all_problems_come_in_one_message(folder: Path) -> None:
    problem_of_change = {
        ("seq_len: 64", "seq_len: 1"): "seq_len is 1",
        ("weight: 0.5", "weight: 0.6"): "sum to 1.2",
        ("ja.jsonl", "no.txt"): "'no.txt'",
        ("language: en", "lang: en"): "sources[1].lang ",
        ("[ja_web]", "[nobody]"): "'nobody'",
    }
    text = GOOD
    for old, new in problem_of_change:
        text = text.replace(old, new)
    problems = "\n".join(problems_of(folder, text))
    for problem in (*problem_of_change.values(), "sources[1].language is missing"):
        assert problem in problems
    assert "Traceback" not in problems


def test_names_of_a_wrong_type_do_not_hide_the_other_problems(folder: Path) -> None:
    text = GOOD.replace("name: en_web", "name: [a]").replace("[ja_web]", "[[b]]")
    problems = "\n".join(problems_of(folder, text.replace("weight: 0.5", "weight: 0.6")))
    assert "sources[1].name is" in problems
    assert "guard.domains[0].sources[0] is" in problems
    assert "sum to 1.2" in problems


def test_a_file_that_is_no_mapping_is_refused(folder: Path) -> None:
    assert problems_of(folder, "- 1\n") == [
        "mix.yaml:1: the file is [1], must be a mapping of keys to values."
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("en", "which is a folder. Name its files: 'en/*.jsonl', or 'en/**/*.jsonl'"),
        ("en/", "which is a folder. Name its files: 'en/*.jsonl', or 'en/**/*.jsonl'"),
        ("gs://bucket/x.jsonl", "which is an address. gs:// is not read: copy the files here"),
        ("https://a.example/x.jsonl", "which is an address. https:// is not read"),
        ("~/x.jsonl", "~ is not replaced in a mix. Write the whole path"),
        ("$HOME/x.jsonl", "variables are not replaced in a mix. Write the whole path"),
        ("'[x].jsonl'", "write [[] for a bracket"),
    ],
)
def test_a_path_that_names_no_file_is_refused_with_what_to_write_instead(
    folder: Path, given: str, message: str
) -> None:
    (problem,) = changed(folder, "ja.jsonl", given)
    assert message in problem


def test_a_folder_that_is_asked_for_and_is_none_is_told_likewise(folder: Path) -> None:
    for given, message in (
        ("ja.jsonl", "which is a file, and the folder that holds it is asked for"),
        ("none", "which is no folder (looked in"),
        ("~/x", "~ is not replaced in a mix"),
    ):
        new = f"path: {given}\n    format: build"
        problems = changed(folder, "path: ja.jsonl", new)
        assert message in problems[0]


def test_one_file_under_two_names_is_refused_with_both(folder: Path) -> None:
    (folder / "link.jsonl").symlink_to("ja.jsonl")
    (problem,) = changed(folder, "path: ja.jsonl", "path: [ja.jsonl, link.jsonl]")
    assert f"names {folder}/ja.jsonl and {folder}/link.jsonl, which are one file" in problem
