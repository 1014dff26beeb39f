"""Forward and backward of a GPT with torch's attention, with Megatron's own, and of the same Llama of transformers.

All have the same weights and must come to the same loss. float32, one thread, one sequence of s tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_mimo import MimoModelInfra
from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.models.gpt import gpt_spec
from lightning_mimo.models.sizes import TransformerSize
from tests.benchmarks.paired import Comparison, compare
from tests.benchmarks.report import Cell, Report
from tests.parity.layouts import Layout, open_world
from tests.support.rank_pool import RankPool
from tests.support.resident import PeakMemory

OURS, OTHERS = "sdpa", ("megatron", "transformers")
SIZE = TransformerSize(
    num_layers=2, hidden_size=256, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=768, style="llama"
)
VOCABULARY = 256
EPSILON = 1e-5  # of RMS norms
ALONE = Layout(modules={"language": Cut(dp=1)})


@dataclass(frozen=True, kw_only=True)
class Length:
    """How often sequences of one length are measured.

    Attributes:
        steps: of a block, whose median counts.
        rounds: of A B B A.
    """

    steps: int
    rounds: int


LENGTHS = {512: Length(steps=5, rounds=6), 2048: Length(steps=2, rounds=3), 8192: Length(steps=1, rounds=2)}
QUICK = {512: Length(steps=1, rounds=1), 1024: Length(steps=1, rounds=1)}

Logits = Callable[[torch.Tensor], torch.Tensor]


def _gpt(kind: str, infra: MimoModelInfra, length: int) -> torch.nn.Module:
    size = replace(SIZE, attention=kind)
    spec = gpt_spec(infra, size, vocab_size=VOCABULARY, max_sequence_length=length)
    torch.manual_seed(1)
    return spec.module(**spec.params)


def _llama(gpt: torch.nn.Module, length: int) -> LlamaForCausalLM:
    """The same as a GPT, in the way of transformers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=SIZE.hidden_size,
        intermediate_size=SIZE.ffn,
        num_hidden_layers=SIZE.num_layers,
        num_attention_heads=SIZE.num_attention_heads,
        num_key_value_heads=SIZE.query_groups,
        max_position_embeddings=length,
        rms_norm_eps=EPSILON,
        use_cache=False,
    )
    llama = LlamaForCausalLM(config)
    weights = {
        "model.embed_tokens.weight": gpt.embedding.word_embeddings.weight,
        "model.norm.weight": gpt.decoder.final_layernorm.weight,
        "lm_head.weight": gpt.output_layer.weight,
    }
    for number, layer in enumerate(gpt.decoder.layers):
        weights |= {f"model.layers.{number}.{name}.weight": tensor for name, tensor in _layer(layer).items()}
    llama.load_state_dict(weights)
    return llama


def _layer(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of one layer by the names that transformers has for them."""
    head, shared = SIZE.hidden_size // SIZE.num_attention_heads, SIZE.num_attention_heads // SIZE.query_groups
    # Megatron has the queries that share keys, these keys and their values side by side.
    groups = layer.self_attention.linear_qkv.weight.view(SIZE.query_groups, (shared + 2) * head, -1)
    query, key, value = (part.flatten(0, 1) for part in groups.split([shared * head, head, head], dim=1))
    gate, up = layer.mlp.linear_fc1.weight.chunk(2)
    return {
        "input_layernorm": layer.input_layernorm.weight,
        "post_attention_layernorm": layer.pre_mlp_layernorm.weight,
        "self_attn.q_proj": query,
        "self_attn.k_proj": key,
        "self_attn.v_proj": value,
        "self_attn.o_proj": layer.self_attention.linear_proj.weight,
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": layer.mlp.linear_fc2.weight,
    }


def _logits(kind: str, infra: MimoModelInfra, length: int) -> Logits:
    gpt = _gpt("sdpa" if kind == "transformers" else kind, infra, length)
    if kind == "transformers":
        llama = _llama(gpt, length)
        return lambda ids: llama(ids).logits
    positions = torch.arange(length)[None]
    return lambda ids: gpt(ids, positions, attention_mask=None)


def _step(logits: Logits, length: int) -> float:
    """Forward and backward. Returns the loss."""
    ids = torch.randint(VOCABULARY, (1, length + 1), generator=torch.Generator().manual_seed(2))
    loss = cross_entropy(logits(ids[:, :-1]).flatten(0, 1), ids[0, 1:])
    loss.backward()
    return float(loss.detach())


def _block(logits: Logits, length: int, steps: int) -> float:
    """Median of the seconds of some steps."""
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        _step(logits, length)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _compared(other: str, length: int, how: Length) -> Comparison:
    """Seconds of a step with torch's attention, and of another, in this process."""
    with open_world(ALONE) as infra:
        blocks = [partial(_block, _logits(kind, infra, length), length, how.steps) for kind in (OURS, other)]
        return compare(*blocks, rounds=how.rounds)


def _held(kind: str, length: int) -> tuple[int, float]:
    """Most bytes of this process's own in two steps, over what it had before the model was made, and the loss."""
    with open_world(ALONE) as infra, PeakMemory() as memory:
        logits = _logits(kind, infra, length)
        _step(logits, length)
        loss = _step(logits, length)
        return memory.take(), loss


def _alone[T](function: Callable[..., T], *args: object) -> T:
    """In a process that has done nothing else: what others have freed, a process keeps."""
    fresh = RankPool(1)
    (found,) = fresh.run(function, *args, world_size=1, timeout=1200)
    fresh.close()
    return found


def measure(pool: RankPool, *, quick: bool) -> Report:
    rows: list[list[Cell]] = []
    details = {}
    for length, how in (QUICK if quick else LENGTHS).items():
        ours, loss = _alone(_held, OURS, length)
        for other in OTHERS:
            held, other_loss = _alone(_held, other, length)
            times: Comparison = pool.run(_compared, other, length, how, world_size=1, timeout=1200)[0]
            spread = min(times.ratios), max(times.ratios), *times.control
            seconds = [statistics.median(each) for each in (times.a, times.b)]
            memory = ours / held, ours / 2**20, held / 2**20
            differs = f"{abs(loss - other_loss) / other_loss:.0e}"
            rows.append([length, other, times.ratio, *spread, *seconds, *memory, differs])
            details[f"{length}, {other}"] = {"sdpa": times.a, other: times.b}
    return Report(
        title="A GPT with torch's attention, over Megatron's own and over transformers: below 1 is less time or memory",
        columns=(
            *("s", "over", "time", "least", "most", "control from", "to", "seconds", "of other"),
            *("peak memory", "MiB", "of other", "loss differs by"),
        ),
        rows=rows,
        notes=(
            "time: of forward and backward, over the rounds of A B B A; control: neighbouring blocks of the same.",
            "Peak memory: the process's own, weights and gradients included, each in a process just started.",
            f"Llama style, {SIZE.num_layers} layers, width {SIZE.hidden_size}, {SIZE.num_attention_heads} heads, "
            f"{SIZE.query_groups} of keys; one sequence, float32, one thread. transformers: its default, SDPA as well.",
        ),
        details=details,
    )
