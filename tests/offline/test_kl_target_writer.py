"""KL targets are the base model's own distributions; those of another model are refused."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import GptOssConfig, GptOssForCausalLM

from cpt.cli import main
from cpt.errors import ConfigError, DataError
from cpt.job.data import open_kl_targets
from cpt.job.loop import step_event
from cpt.model.configuration import load_config
from cpt.model.loss.divergence import TopKTargets
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.directory import DirectoryWeights
from cpt.offline.model import OfflineModel
from cpt.offline.ranks import single_process
from cpt.parallel.topology import Topology
from cpt.training.kl_target_format import SIDECAR, read_sidecar, target_file
from cpt.training.kl_targets import KLTargets, check_targets
from cpt.training.loader import MicroBatch, places_of_rank, read_micro_batch, send
from data_pipeline.build.build import build
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import IGNORED_LABEL, BuiltData
from data_pipeline.mixture.mixture import GlobalBatch
from data_pipeline.text.tokenizer import VOCAB_SIZE
from tests.data_pipeline.inputs import mask_texts
from tests.support.records import write_jsonl

SEQ_LEN = 16
TOP_K = 7
ENGLISH = (
    "Lamp {} along the river was lit before dusk, and its keeper went home over the bridge, as he "
    "always did."
)
JAPANESE = "{} \u6614\u3005\u3001\u3042\u308b\u3068\u3053\u308d\u306b\u304a\u3058\u3044\u3055\u3093"
TEXTS = {
    "replay": [ENGLISH.format(n) for n in range(9)],
    "ja": [JAPANESE.format(n) for n in range(9)],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    folder = tmp_path_factory.mktemp("base") / "model"
    config = GptOssConfig(vocab_size=VOCAB_SIZE, initializer_range=0.5, **sizes, **heads)
    GptOssForCausalLM(config).save_pretrained(folder)
    return folder


def built(folder: Path, texts: dict[str, list[str]] = TEXTS) -> Path:
    folder.mkdir(parents=True)
    sources = []
    for name, documents in texts.items():
        write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in documents])
        kind = {"language": "en", "domain": "web", "path": f"{name}.jsonl", "weight": 0.5}
        sources.append({"name": name, **kind})
    mix = {"seq_len": SEQ_LEN, "seed": 1, "near_duplicates": 0, "sources": sources}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    build(load_mix(folder / "mix.yaml"), folder / "build", progress=False)
    return folder / "build"


def targets_command(base: Path, build_dir: Path, out: Path, *options: str) -> int:
    place = ("--model", str(base), "--build", str(build_dir), "--out", str(out))
    return main(["kl_targets", *place, "--top_k", str(TOP_K), *options])


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuiltData]:
    """Targets of the source `replay`, and the build."""
    folder = tmp_path_factory.mktemp("targets")
    build_dir = built(folder / "data")
    assert targets_command(base, build_dir, folder / "targets", "--source", "replay") == 0
    return folder / "targets", BuiltData.open(build_dir)


def opened(folder: Path, data: BuiltData) -> KLTargets:
    row_tokens = {name: data.row_tokens(number) for number, name in enumerate(data.source_names)}
    return KLTargets(folder, data.source_names, row_tokens)


def targets_of(
    targets: KLTargets, data: BuiltData, places: list[tuple[int, int]], topology: Any
) -> TopKTargets | None:
    return read_micro_batch(data, tuple(places), topology, targets).targets


def part(sp_size: int, sp_rank: int) -> Any:
    return types.SimpleNamespace(sp_size=sp_size, sp_rank=sp_rank, device=torch.device("cpu"))


def config_of(base: Path | None, targets: Path) -> Any:
    model = types.SimpleNamespace(path=base, init=None if base else "tiny")
    return types.SimpleNamespace(model=model, train=types.SimpleNamespace(kl_targets=targets))


def test_stored_distributions_are_those_of_plain_transformers(
    written: tuple[Path, BuiltData], base: Path
) -> None:
    data = written[1]
    model = GptOssForCausalLM.from_pretrained(base, attn_implementation="eager")
    targets = opened(*written)
    compared = 0
    for row in range(data.num_rows(0)):
        packed = data.read_row(0, row)
        if len(packed.documents) > 1:
            continue  # transformers does not keep packed documents apart
        count = int((packed.labels >= 0).sum())
        with torch.no_grad():
            logits = model(torch.from_numpy(packed.input_ids[None, :count])).logits[0]
        log_q = logits.double().log_softmax(1)
        found = targets_of(targets, data, [(0, row)], part(1, 0))
        assert found is not None and found.at_n.tolist() == list(range(count))
        assert torch.equal(found.ids_nk, log_q.topk(TOP_K).indices)
        others = log_q.scatter(1, found.ids_nk, float("-inf")).logsumexp(1, keepdim=True)
        difference = found.log_p_nK - torch.cat([log_q.gather(1, found.ids_nk), others], 1)
        assert float(difference.abs().max()) <= 2e-5, difference.abs().max()
        compared += 1
    assert compared >= 5


def test_ranks_that_share_a_row_read_its_parts_and_other_sources_have_none(
    written: tuple[Path, BuiltData],
) -> None:
    targets = opened(*written)
    data = written[1]
    places = [(1, 0), (0, 2), (0, 0)]
    whole = targets_of(targets, data, places, part(1, 0))
    halves = [targets_of(targets, data, places, part(2, rank)) for rank in (0, 1)]
    assert whole is not None and targets_of(targets, data, [(1, 0), (1, 1)], part(1, 0)) is None
    joined = {}
    for rank, half in enumerate(halves):
        assert half is not None
        for at, ids, log_p in zip(
            half.at_n.tolist(), half.ids_nk.tolist(), half.log_p_nK.tolist(), strict=True
        ):
            row, slot = divmod(at, SEQ_LEN // 2)
            joined[row * SEQ_LEN + rank * SEQ_LEN // 2 + slot] = (ids, log_p)
    assert sorted(joined) == whole.at_n.tolist()
    expected = zip(whole.ids_nk.tolist(), whole.log_p_nK.tolist(), strict=True)
    assert [joined[at] for at in sorted(joined)] == list(expected)


def test_targets_stand_where_the_labels_of_a_masked_row_are(
    written: tuple[Path, BuiltData], base: Path, tmp_path: Path
) -> None:
    """They are those of the same slots without a mask, on each rank that shares the row."""
    plain = written[1]
    with pytest.MonkeyPatch.context() as monkeypatch:
        mask_texts(monkeypatch)
        build_dir = built(tmp_path / "data")
    assert targets_command(base, build_dir, tmp_path / "targets", "--source", "replay") == 0
    data = BuiltData.open(build_dir)
    targets = opened(tmp_path / "targets", data)
    of_all = opened(*written)
    compared = 0
    for row in range(data.num_rows(0)):
        expected = targets_of(of_all, plain, [(0, row)], part(1, 0))
        assert expected is not None
        for sp_size, sp_rank in ((1, 0), (2, 0), (2, 1)):
            local = SEQ_LEN // sp_size
            labels = data.read_row(0, row).labels[sp_rank * local : (sp_rank + 1) * local]
            slots = np.flatnonzero(labels != IGNORED_LABEL)
            found = targets_of(targets, data, [(0, row)], part(sp_size, sp_rank))
            if not len(slots):
                assert found is None
                continue
            assert found is not None and found.at_n.tolist() == slots.tolist()
            at_n = torch.from_numpy(slots + sp_rank * local)
            assert torch.equal(found.ids_nk, expected.ids_nk[at_n])
            assert torch.allclose(found.log_p_nK, expected.log_p_nK[at_n], rtol=0, atol=1e-5)
            compared += len(slots)
    assert compared > 2 * 40


def micro_batch(data: BuiltData, targets: KLTargets | None, topology: Topology) -> MicroBatch:
    places = np.array([[0, 1, 0], [3, 0, 1]])
    batch = GlobalBatch(
        step=0,
        sources=places[0],
        rows=places[1],
        predicted_tokens=np.zeros(3, int),
        epochs=np.zeros(3, int),
    )
    read = read_micro_batch(data, places_of_rank(batch, 0, 3, topology), topology, targets)
    return send(read, topology.device)


def test_a_run_from_the_base_model_starts_at_divergence_zero(
    written: tuple[Path, BuiltData], base: Path
) -> None:
    folder, data = written
    config = load_config(base, None)
    with single_process() as topology:
        targets = open_kl_targets(config_of(base, folder), data, topology)
        assert targets is not None and targets.sources == ["replay"]
        offline = OfflineModel(config, topology)
        offline.load(DirectoryWeights(base, parameter_shapes(config)))
        batch = micro_batch(data, targets, topology)
        plain = offline.score(dataclasses.replace(batch, targets=None))
        nll, kl = offline._model(
            batch.input_ids,
            batch.position_ids,
            batch.labels,
            targets=batch.targets,
            packed_rows=batch.packed_rows,
            kernel=offline._kernel,
        )
        (gradient,) = torch.autograd.grad(kl.sum(), offline._model.lm_head.weight)
        assert torch.allclose(nll, plain, rtol=0, atol=1e-5)
        # some 30 tokens, each log-probability rounded to fp32 and summed in another order
        assert float(kl.detach().abs().max()) <= 2e-6 and float(gradient.norm()) <= 1e-4
        with pytest.raises(
            ConfigError, match=r"this run starts from init: tiny \(random weights\)"
        ):
            open_kl_targets(config_of(None, folder), data, topology)


def test_targets_of_another_model_or_of_other_rows_are_refused_with_figures(
    written: tuple[Path, BuiltData], base: Path, tmp_path: Path
) -> None:
    folder, data = written
    weights = [base / "model.safetensors"]
    sidecar = read_sidecar(folder)
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"other weights")
    with pytest.raises(
        ConfigError,
        match=rf"of the model {sidecar.base_model[:16]}, this run starts from elsewhere",
    ):
        check_targets(folder, data, [other], "elsewhere")
    more = {**TEXTS, "replay": [*TEXTS["replay"], "One more of them stood at the far end."]}
    with pytest.raises(ConfigError) as refused:
        check_targets(folder, BuiltData.open(built(tmp_path / "more", more)), weights, "base")
    stored = sidecar.sources["replay"]
    assert f"{stored.rows} rows of {stored.tokens} tokens" in str(refused.value)
    assert refused.value.exit_code == 78
    without = built(tmp_path / "without", {"ja": TEXTS["ja"], "chat": TEXTS["replay"]})
    with pytest.raises(ConfigError, match="has source 'replay'"):
        check_targets(folder, BuiltData.open(without), weights, "base")
    edited = built(tmp_path / "edited", {**TEXTS, "ja": TEXTS["ja"][:5]})
    # rows of another source may change
    check_targets(folder, BuiltData.open(edited), weights, "base")


def test_damaged_or_missing_targets_are_refused(
    written: tuple[Path, BuiltData], base: Path, tmp_path: Path
) -> None:
    folder, data = written
    (tmp_path / SIDECAR).write_bytes((folder / SIDECAR).read_bytes())
    weights = [base / "model.safetensors"]
    with pytest.raises(DataError, match="no file"):
        check_targets(tmp_path, data, weights, "base")
    content = bytearray(target_file(folder, "replay").read_bytes())
    content[-5] ^= 1
    target_file(tmp_path, "replay").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        check_targets(tmp_path, data, weights, "base")
    with pytest.raises(ConfigError, match="does not exist"):
        check_targets(tmp_path / "nowhere", data, weights, "base")


def test_a_request_that_cannot_be_right_is_refused(
    written: tuple[Path, BuiltData], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = written
    options = ("--source", "repaly", "--source", "replay", "--source", "replay", "--top_k", "0")
    assert targets_command(base, data.directory, tmp_path / "x", *options) == 78
    printed = capsys.readouterr().err
    assert "repaly" in printed
    assert "names a source twice" in printed
    assert "--top_k 0 must be between 1" in printed
    assert targets_command(base, data.directory, folder, "--source", "replay") == 78
    assert "exists already" in capsys.readouterr().err


def test_the_divergence_has_a_field_of_its_own_in_metrics() -> None:
    data = types.SimpleNamespace(source_names=("replay", "ja"), languages=("en", "ja"))
    progress = types.SimpleNamespace(step=3, tokens=24)
    result = types.SimpleNamespace(
        loss=2.0,
        grad_norm=1.0,
        nll_by_source=[10.0, 30.0],
        kl_by_source=[5.0, 0.0],
        tokens_by_source=[10, 10],
        bytes_sent={},
    )
    job: Any = types.SimpleNamespace(
        data=data,
        stages=None,
        progress=progress,
        kl_targets=types.SimpleNamespace(sources=["replay"]),
        kl_weight=0.3,
        topology=types.SimpleNamespace(device=torch.device("cpu")),
    )
    event = step_event(job, result, 1e-3, 1.0, 80)  # type: ignore[arg-type]
    assert event["kl_by_source"] == {"replay": 0.5} and event["loss"] == 2.0
    assert event["kl_weight"] == 0.3
    assert (event["tokens"], event["slots"], event["tokens_per_second"]) == (20, 80, 80.0)
    job.kl_targets = None
    assert "kl_by_source" not in step_event(job, result, 1e-3, 1.0, 80)  # type: ignore[arg-type]
