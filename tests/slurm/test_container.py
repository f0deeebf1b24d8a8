"""What can be said of the container image without building it."""

from __future__ import annotations

import pytest

from tests.support.launcher import ROOT

LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
INSTRUCTIONS = [
    (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1])
    for line in LINES
    if line and line[0].isupper()
]


@pytest.mark.case(
    "X7", "the image's last user is a number other than 0 (read from the Dockerfile, not built)"
)
def test_image_runs_as_a_numeric_user_that_is_not_root() -> None:
    names = [name for name, _ in INSTRUCTIONS]
    users = [user for name, user in INSTRUCTIONS if name == "USER"]
    assert len(users) == 1 and users[0].isdigit() and int(users[0]) > 0
    assert names[names.index("USER") :] == ["USER", "CMD"]
    assert any(
        f"useradd --create-home --uid {users[0]} " in words
        for name, words in INSTRUCTIONS
        if name == "RUN"
    )


def test_code_in_the_image_belongs_to_root_and_everything_copied_is_there() -> None:
    copied = [words.split() for name, words in INSTRUCTIONS if name in ("COPY", "ADD")]
    assert {"cpt", "data_pipeline", "configs", "ds_configs"} <= {
        source for words in copied for source in words[:-1]
    }
    for words in copied:
        assert not any(word.startswith("--chown") for word in words)
        assert all((ROOT / source).exists() for source in words[:-1])
    given_away = [
        words
        for name, words in INSTRUCTIONS
        if name == "RUN" and ("chown" in words or "-o cpt" in words)
    ]
    assert given_away == ["install -d -o cpt -g cpt data runs"]
