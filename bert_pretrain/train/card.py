"""The model card: a README.md beside the checkpoint with what was trained, on what, how, and how well."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainerState

from bert_pretrain.block import BlockOptions
from bert_pretrain.model import PackedBertForPreTraining
from bert_pretrain.objective import OBJECTIVES, pair_columns
from bert_pretrain.train.config import PretrainConfig
from bert_pretrain.train.metrics import attends_fully
from bert_pretrain.train.run_record import versions
from packing import PackedInfo

LOADING = """\
The checkpoint is that of `transformers.BertForPreTraining`, tensor for tensor:

```python
from transformers import AutoTokenizer, BertForPreTraining, pipeline

model = BertForPreTraining.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
pipeline("fill-mask", model="{name}")("… {mask} …")
```
"""

OURS = """

```python
from bert_pretrain import PackedBertForPreTraining

model = PackedBertForPreTraining.from_pretrained("{name}")
```
"""
LOADING_OTHER_ATTENTION = f"""\
It was trained with the attention head `{{attention}}`; stock transformers has its weights but not its attention. So
load it with{OURS}"""
LOADING_OTHER_BLOCK = f"""\
Its layers have another block than BERT's, so stock transformers refuses it. Load it with{OURS}
Once `bert_pretrain.block` is imported, `AutoModel`, `AutoModelForSequenceClassification` and their like load it, too.
For `AutoModelForPreTraining` import `bert_pretrain.model`.
Call these with `sequence_ids=`: 1 for the tokens of a sequence, 0 for padding.
"""


def model_card(
    name: str,
    config: PretrainConfig,
    model: PackedBertForPreTraining,
    data: PackedInfo,
    objective: str,
    state: TrainerState,
    seen: Mapping[str, float],
    mask_token: str,
    best_step: int | None,
) -> ModelCard:
    """The model card.

    name: of the model, or of the repository that it goes to. state: the trainer's. seen: "sequences_seen" and
        "tokens_seen" by the end of training, which may be later than the last log.
    best_step: the step that the model is of, if it is not the last one.
    """
    bert, is_full = model.config, attends_fully(model)
    block = BlockOptions.of(getattr(bert, "block", None))
    loading = LOADING if is_full else LOADING_OTHER_ATTENTION
    loading = loading if block.computes_stock else LOADING_OTHER_BLOCK
    trained = _last(state.log_history, "loss")
    evaluated = {key.removeprefix("eval_"): value for key, value in _last(state.log_history, "eval_loss").items()}
    attention = bert.packed_attention if isinstance(bert.packed_attention, str) else ", ".join(bert.packed_attention)
    tags = ["bert", "pretraining", "masked-lm", "sequence-packing"]
    metadata = ModelCardData(library_name="transformers", pipeline_tag="fill-mask", tags=tags, base_model=config.model)
    assert data.num_sequences is not None and data.num_packs is not None and data.num_tokens is not None
    facts = {  # names of folders alone: a card is public, and must not tell where they lie
        "data": f"`{Path(config.dataset).name}`: {data.num_sequences:,} sequences of {data.num_tokens:,} tokens",
        "packed": f"into {data.num_packs:,} packs of {data.max_sequence_length} tokens: packing efficiency "
        f"{data.num_tokens / (data.num_packs * data.max_sequence_length):.4f}, packing factor "
        f"{data.num_sequences / data.num_packs:.3f}, at most {data.max_depth} sequences in a pack",
        "objective": " and ".join(filter(None, ("masked language modelling", OBJECTIVES[objective].name))),
        "MLM loss": f"mean per {config.mlm_loss}, {config.mlm_probability:.0%} of the tokens predicted in training, "
        f"{config.eval_mlm_probability:.0%} in evaluation",
        "architecture": f"{bert.num_hidden_layers} layers of {bert.hidden_size}, {bert.num_attention_heads} attention "
        f"heads, feed-forward {bert.intermediate_size}, {bert.max_position_embeddings} positions, vocabulary "
        f"{bert.vocab_size:,}",
        "attention": f"`{attention}`" + (", full attention" if is_full else ""),
        "trained for": f"{state.global_step:,} optimizer steps of "
        + ("equally many packs" if config.batch_policy == "packs" else f"{config.sequences_per_step:,} sequences"),
    }
    if block.changed:
        facts["block"] = ", ".join(f"{option} `{value}`" for option, value in block.changed.items())
    if seen["sequences_seen"]:
        facts["seen"] = f"{seen['sequences_seen']:,} sequences, {seen['tokens_seen']:,} real tokens"
    if best_step is not None:
        facts["this model"] = f"that of step {best_step:,}, the best of those that were evaluated"
    if config.model is not None:
        facts["started from"] = f"`{Path(config.model).name}`"
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}",
        "BERT, pretrained on packed sequences that do not see each other: the result of training without packing.",
        _table(("", ""), facts.items()),
        "## Results",
        _results(trained, evaluated),
        "## Use",
        loading.format(name=name, attention=attention, mask=mask_token),
        "## Versions",
        _table(("package", "version"), versions().items()),
    ]
    return ModelCard("\n\n".join(part.strip() for part in parts) + "\n")


def _results(trained: Mapping[str, Any], evaluated: Mapping[str, Any]) -> str:
    """Losses and accuracies at the end: of the last logged interval of training, and held out."""
    learned = ("loss", "mlm", *pair_columns())
    names = [name for name in {**trained, **evaluated} if name.split("_")[0] in learned]
    if not names:
        return "Nothing was logged."
    rows = [(name.replace("_", " "), _number(trained.get(name)), _number(evaluated.get(name))) for name in names]
    at = f", step {trained['step']:,}" if "step" in trained else ""
    return _table(("", f"training{at}", "held out"), rows) + (
        "\n\nCompare a pair accuracy with the majority: that of always giving the more frequent label."
        if any(name.endswith("_majority") for name in names)
        else ""
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _last(log_history: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    return next((entry for entry in reversed(log_history) if key in entry), {})
