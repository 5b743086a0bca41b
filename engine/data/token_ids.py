"""Token ids and the table of embeddings that they are looked up in: it may have fewer rows than a tokenizer has tokens.

An id without a row is an IndexError on the CPU. On a GPU it ends the CUDA context, with words about an assertion that
say nothing of it: so ids are looked at before the model is.
"""

from typing import TYPE_CHECKING

from engine.errors import DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def rows_of(model: "PreTrainedModel") -> int:
    """Return the rows of the table of embeddings of `model`."""
    table = model.get_input_embeddings().weight
    rows: int = table.shape[0]  # type: ignore[index, assignment]
    return rows


def padding_id(tokenizer: "PreTrainedTokenizerBase", rows: int | None) -> int:
    """Return an id to pad with: the tokenizer's own, else its end token, else 0; one that has a row.

    Padding is always masked. A padding token that was added to a tokenizer alone has no row.

    Args:
        tokenizer: of the base model.
        rows: of the table; None where that is not known.
    """
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((each for each in ids if isinstance(each, int) and (rows is None or each < rows)), 0)


def require_rows(largest: int, rows: int | None, model: str) -> None:
    """Do nothing where all ids up to `largest` have a row.

    Args:
        largest: id; -1 of no ids.
        rows: of the table; None where that is not known.
        model: as the spec names it.

    Raises:
        DatasetError: they have not: the tokenizer is not that of the model.
    """
    if rows is not None and largest >= rows:
        raise DatasetError(
            f"The tokenizer of {model!r} gives token ids up to {largest:,} here, and the model's table of embeddings "
            f"has {rows:,} rows, for ids up to {rows - 1:,}. Give the model the tokenizer that it was trained with, or "
            "use text and a template without the tokens that were added to it."
        )
