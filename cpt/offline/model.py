"""A gpt-oss model that scores and writes text: exports, merged and quantized weights.

The forward pass is that of training (sink attention on packed rows, tiled loss) without DeepSpeed's
engine. On a CPU it computes in fp32, whatever the weights are stored in; on a GPU in bf16.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GptOssConfig

from cpt.errors import ConfigError
from cpt.guard.drawing import drawing_order
from cpt.guard.score import ScoredSet
from cpt.model import attention, gpt_oss
from cpt.model.decoding import PromptPass, TokenPass, next_token_logits
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.source import WeightSource, fill_model
from cpt.parallel.agreement import gather_json, together
from cpt.parallel.topology import Topology
from cpt.training.loader import MicroBatch
from data_pipeline.build.found_builds import found_or_default, load_built_mix, matching_builds
from data_pipeline.build.origin import absent_sources, compare
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import IGNORED_LABEL, BuiltData

log = logging.getLogger("cpt.offline.model")


def held_out_sets(mix_file: Path, build_dir: Path | None, max_documents: int) -> list[ScoredSet]:
    """Return the held-out sets of a data mix.

    Args:
        mix_file: The data-mix YAML.
        build_dir: Directory of its build; None for the default one.
        max_documents: Documents scored per set at most; of each cluster of documents that belong
            together (`cluster_by`, turns of a conversation) it is one.

    Raises:
        ConfigError: the mix is wrong, not built, or holds nothing out.
    """
    mix = load_built_mix(mix_file, build_dir)
    directory = build_dir or _default_build(mix)
    if not directory.is_dir():
        raise ConfigError(
            f"{mix_file} is not built in {directory}. Build it: python -m data_pipeline build "
            f"{mix_file} --out {directory}, or give its folder with --build_dir."
        )
    data = BuiltData.open(directory, verify=False, mix=mix)
    for difference in compare(data.manifest, mix, read_contents=False).differences:
        log.warning("%s is not %s as it is: %s", directory, mix_file, difference)
    sets = []
    for domain in data.held_out:
        if domain.num_documents:
            order, num_clusters = drawing_order(domain.document_clusters)
            # intervals take documents for independent ones, which those of a cluster are not
            sets.append(ScoredSet(domain, order[: min(max_documents, num_clusters)]))
    if not sets:
        raise ConfigError(f"{mix_file} holds no document out. Give its sources a held_out_share.")
    return sets


def _default_build(mix: MixConfig) -> Path:
    """Return the build of a mix in data/, or the default directory where there is none.

    Raises:
        ConfigError: several directories may hold it.
        DataError: an input file cannot be read.
    """
    if not absent_sources(mix):
        return found_or_default(mix)
    found = matching_builds(mix)
    if len(found) > 1:
        raise ConfigError(
            f"{', '.join(map(str, found))}: each may be the build of mix '{mix.name}', whose files "
            "are not here. Name one of them with --build_dir."
        )
    return found[0]


class OfflineModel:
    """A gpt-oss model without an engine; `load` may give it other weights again and again.

    Shape letters: B rows, S tokens of a row, M model size.
    """

    def __init__(self, config: GptOssConfig, topology: Topology) -> None:
        """Allocate the model; its weights come from `load`."""
        self.dtype = torch.float32 if topology.device.type == "cpu" else torch.bfloat16
        """Dtype of the forward pass."""
        self.topology = topology
        self.model_config = config
        self._model = gpt_oss.skeleton(config, self.dtype)
        gpt_oss.patch(self._model, topology)
        gpt_oss.materialize(self._model, topology.device)
        self._model.eval()
        self._kernel = attention.choose(
            "auto", device=topology.device, dtype=self.dtype, head_dim=config.head_dim
        )

    def load(self, source: WeightSource) -> None:
        """Take the weights of a source; all ranks call it together, and each reads its experts.

        Raises:
            ConfigError: values of a directory are not finite, or tensors hold only zeros.
        """
        group = self.topology.control_group
        together(group, lambda: fill_model(self._model, source))
        if isinstance(source, DirectoryWeights):
            source.refuse_unusable(gather_json(source.seen_json(), group))

    @contextmanager
    def _same_bits_in_every_layout(self) -> Iterator[None]:
        """On a CPU, compute in fp32 what one process computes, bit for bit, inside the block.

        A GPU takes all rows of an expert at once, whatever rank they come from: it is faster, and
        bf16 rounds far more coarsely than layouts differ.
        """
        if self.topology.device.type != "cpu":
            yield
            return
        mlps = [layer.mlp for layer in self._model.model.layers]
        for mlp in mlps:
            mlp.apart = True
        try:
            yield
        finally:
            for mlp in mlps:
                mlp.apart = False

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> torch.Tensor:
        """Return the (B, S) nats of a batch's tokens on the CPU, 0 where there is no label.

        If the batch has targets, the result is (2, B, S): the loss, then the divergence.
        """
        with self._same_bits_in_every_layout():
            losses: torch.Tensor = self._model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                labels=batch.labels,
                targets=batch.targets,
                packed_rows=batch.packed_rows,
                kernel=self._kernel,
            )
        return losses.cpu()

    @torch.no_grad()
    def top_k(self, batch: MicroBatch, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the likeliest next tokens of the tokens of a batch that have a label.

        Args:
            batch: The batch.
            k: Tokens listed per token.

        Returns:
            The output of `LossHead.top_k`, on the CPU.
        """
        with self._same_bits_in_every_layout():
            hidden_BSM = self._model.hidden_states(
                batch.input_ids,
                batch.position_ids,
                packed_rows=batch.packed_rows,
                kernel=self._kernel,
            )
        has_label_BS = batch.labels != IGNORED_LABEL
        ids, log_p = self._model.lm_head.top_k(hidden_BSM[has_label_BS], k)
        return ids.cpu(), log_p.cpu()

    @torch.no_grad()
    def next_token_logits(self, cache_pass: PromptPass | TokenPass) -> torch.Tensor:
        """Run a pass of decoding; see `cpt.model.decoding.next_token_logits`."""
        return next_token_logits(self._model, cache_pass, self._kernel)
