"""Where documents begin in a row of tokens, for a model that keeps them apart (`train --documents mask`).

On the disk `<|endoftext|>` ends each document. To a model it begins the next one: it has position 0 and sees itself
alone, so it predicts the document's first token as in generation, where a prompt begins with it. The last token of the
old document predicts it, seeing the whole document. So every target is predicted inside its own document, and none is
left out of the loss. A row that begins inside a document counts from 0 as well: what comes before is not in the row.
"""

import torch


def document_positions(ids: torch.Tensor, eot_id: int | None) -> torch.Tensor | None:
    """(B, T) ids -> the place of each token in its document, (B, T); None if no `eot_id` is given to tell them apart.

    Given as `position_ids`, they keep the model from looking into another document.
    """
    if eot_id is None:
        return None
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)  # in the row
    return place - place.where(ids == eot_id, 0).cummax(dim=1).values
