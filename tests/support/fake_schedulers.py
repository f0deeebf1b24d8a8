"""Stand-ins for `qsub` and `qstat` of PBS and AGE, which reject what the real ones would.

    python fake_schedulers.py FOLDER pbs|age qsub|qstat WORDS...

A job is a JSON file in FOLDER, its name the number of the job.  Only what a job template may use is
known; every other option is refused.  Texts of refusals and of qstat are those of OpenPBS, and of
Grid Engine and TSUBAME's manual.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

QUEUES = {"rt_HF": 168 * 3600, "rt_HG": 168 * 3600}
"""PBS: queues that take jobs from users, and their limit in seconds."""
EXECUTION_QUEUE = "hf_exec"
"""PBS: the queue in which jobs of rt_HF run; it takes jobs from routing queues only."""
GROUPS = ("gaa50000", "tga-team")
"""Groups that have points."""
PBS_RESOURCES = ("select", "place", "walltime", "filesystems")
CHUNK_RESOURCES = ("ncpus", "mpiprocs", "ngpus", "mem")
AGE_RESOURCES = ("node_f", "h_rt", "hostname", "h")
TRIAL_SECONDS = 600
"""AGE: how long a job without a group may run."""

Json = dict[str, Any]


def refuse(text: str) -> NoReturn:
    print(text, file=sys.stderr)
    raise SystemExit(1)


def seconds(limit: str) -> int:
    total = 0
    for part in limit.split(":"):
        total = 60 * total + int(part)
    return total


def directives(script: Path, mark: str) -> list[str]:
    """Return the options in the head of a script."""
    found = []
    for line in script.read_text().splitlines():
        if line.startswith(f"{mark} "):
            found += line.removeprefix(f"{mark} ").split()
    return found


def read_options(words: list[str], flags: tuple[str, ...]) -> tuple[dict[str, list[str]], str]:
    """Return the values of each option, and the script."""
    options: dict[str, list[str]] = {}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option in flags:
            continue
        if len(option) != 2 and option not in ("-ar", "-pe"):
            refuse(f"qsub: Unknown option {option}")
        options.setdefault(option, []).append(rest.pop(0))
    return options, rest[0] if rest else ""


def resources_of(lists: list[str]) -> dict[str, str]:
    """Return the resources of all -l, the last of a name."""
    found = {}
    for words in lists:
        for word in words.split(","):
            name, _, value = word.partition("=")
            found[name] = value
    return found


def store(folder: Path, job: Json) -> str:
    number = str(len(list(folder.glob("*.json"))) + 1)
    (folder / f"{number}.json").write_text(json.dumps(job))
    return number


def asked_for(
    folder: Path, words: list[str], option: str, unknown: str, *, server: str = ""
) -> tuple[str, Json]:
    """Return number and content of the job that a command line such as `-f 1.server` names.

    Args:
        folder: Where the jobs are stored.
        words: The command line.
        option: The one option that is taken.
        unknown: What stands before the number in the refusal.
        server: What may stand behind the number.
    """
    given, number = words
    path = folder / f"{number.removesuffix(server)}.json"
    if given != option or not path.exists():
        refuse(f"{unknown}{number}")
    job: Json = json.loads(path.read_text())
    return number, job


def pbs_qsub(folder: Path, words: list[str]) -> None:
    """Take a job as PBS does: the command line goes before the head of the script."""
    given, script = read_options(words, ())
    head, _ = read_options(directives(Path(script), "#PBS"), ())
    resources = {**resources_of(head.get("-l", [])), **resources_of(given.get("-l", []))}
    for name in resources:
        if name in CHUNK_RESOURCES:
            refuse(
                f'qsub: "-lresource=" cannot be used with "select" or "place", resource is: {name}'
            )
        if name not in PBS_RESOURCES:
            refuse(f"qsub: Unknown resource: {name}")
    queue = given.get("-q", ["default"])[-1]
    if queue not in QUEUES:
        refuse("qsub: Unknown queue" if queue != EXECUTION_QUEUE else "qsub: Unauthorized Request")
    group = given.get("-P", [""])[-1] or given.get("-W", [""])[-1].removeprefix("group_list=")
    if group not in GROUPS:
        refuse("qsub: Unauthorized Request, no group with points")
    if seconds(resources["walltime"]) > QUEUES[queue]:
        refuse("qsub: Job violates queue and/or server resource limits")
    job = {"queue": queue, "resources": resources, "script": script, "given": given}
    print(f"{store(folder, job)}.server")


def pbs_qstat(folder: Path, words: list[str]) -> None:
    """Print a job as `qstat -f` does: lines of 79 columns, cut in the middle of words."""
    number, job = asked_for(folder, words, "-f", "qstat: Unknown Job Id ", server=".server")
    given, resources = job["given"], job["resources"]
    fields = {"Job_Name": given.get("-N", ["cpt"])[-1], "job_state": "R"}
    fields["resources_used.walltime"] = os.environ.get("FAKE_USED", "00:00:05")
    fields["queue"] = EXECUTION_QUEUE
    fields["Error_Path"] = "login1:" + "/gs/user" * 12 + "/cpt.e1"
    if "-A" in given:
        fields["Account_Name"] = given["-A"][-1]
    if "-W" in given:
        fields["group_list"] = given["-W"][-1].removeprefix("group_list=")
    fields["Resource_List.nodect"] = resources["select"].split(":")[0]
    fields["Resource_List.ncpus"] = "384"
    for name in sorted(resources):
        fields[f"Resource_List.{name}"] = resources[name]
    fields.setdefault("Resource_List.place", "scatter:excl")
    fields["Resource_List.rt_h100-80"] = "16"
    fields["Variable_List"] = "PBS_O_HOME=/gs/user,PBS_O_QUEUE=rt_HF," + "PBS_O_PATH=/a:" * 20
    fields["project"] = given.get("-P", ["_pbs_project_default"])[-1]
    print(f"Job Id: {number}")
    for name, value in fields.items():
        line = f"    {name} = {value}"
        print("\n\t".join(line[i : i + 78] for i in range(0, len(line), 78)))


def age_qsub(folder: Path, words: list[str]) -> None:
    """Take a job as AGE on TSUBAME does."""
    given, script = read_options(words, ("-cwd",))
    head, _ = read_options(directives(Path(script), "#$"), ("-cwd",))
    resources = {**resources_of(head.get("-l", [])), **resources_of(given.get("-l", []))}
    for name in resources:
        if name not in AGE_RESOURCES:
            refuse(f'Unable to run job: unknown resource "{name}".')
    if "h_rt" not in resources:
        refuse("Unable to run job: Job is rejected. h_rt must be specified.")
    group = given.get("-g", [""])[-1]
    if group not in GROUPS and seconds(resources["h_rt"]) > TRIAL_SECONDS:
        refuse("Job is rejected, h_rt can not be longer than 10 mins with this group")
    job = {"group": group, "resources": resources, "script": script, "given": given}
    print(f'Your job {store(folder, job)} ("cpt") has been submitted')


def age_qstat(folder: Path, words: list[str]) -> None:
    """Print a job as `qstat -j` does."""
    unknown = "Following jobs do not exist or permissions are not sufficient:\n"
    number, job = asked_for(folder, words, "-j", unknown)
    given, resources = job["given"], job["resources"]
    limit = {"h_rt": str(seconds(resources["h_rt"]))}
    listed = ",".join(f"{name}={value}" for name, value in {**resources, **limit}.items())
    fields = {"job_number": number, "owner": "user", "group": job["group"] or "users"}
    fields |= {"sge_o_workdir": "/gs/user/project: a", "account": "sge", "cwd": "/gs/user"}
    fields |= {"hard resource_list": listed, "job_name": given.get("-N", ["cpt"])[-1]}
    if "-p" in given:
        fields["priority"] = given["-p"][-1]
    fields |= {"env_list": "CPT_RUN_DIR=runs/a", "project": "NONE"}
    if "-ar" in given:
        fields["ar_id"] = given["-ar"][-1]
    print("=" * 62)
    for name, value in fields.items():
        print(f"{name + ':':<28}{value}")


def main() -> None:
    folder, kind, program, *words = sys.argv[1:]
    assert re.fullmatch("pbs|age", kind) and re.fullmatch("qsub|qstat", program)
    programs = {
        "pbs qsub": pbs_qsub,
        "pbs qstat": pbs_qstat,
        "age qsub": age_qsub,
        "age qstat": age_qstat,
    }
    programs[f"{kind} {program}"](Path(folder), words)


if __name__ == "__main__":
    main()
