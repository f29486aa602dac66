"""A training run's evaluation: validation loss, tasks and samples, by all ranks in the training process."""

import math

import torch

from gpt2repro.data.tokenization import unknown_characters
from gpt2repro.evaluation.losses import inference, is_fsdp, loss_metrics, token_byte_lengths, validation_loss
from gpt2repro.evaluation.tasks import prepare_tasks
from gpt2repro.options import InputError
from gpt2repro.training.machine import step_seed


class Evaluator:
    """The measurements that a run repeats; what is the same each time is prepared once.

    `config` is a TrainConfig, `source` the training data with its tokenizer and validation split.
    """

    def __init__(self, config, accelerator, model, source):
        self.config, self.accelerator, self.model, self.source = config, accelerator, model, source
        prompts = "".join(config.sample_prompts) if config.sample_tokens else ""
        if unknown := unknown_characters(source.tokenizer, prompts):
            raise InputError(f"the data's tokenizer knows no {unknown[0]!r}; change sample_prompts, which has it")
        self._token_bytes = bytes_of_tokens(source)
        specs = [*config.eval_tasks, *([f"hellaswag={config.hellaswag}"] if config.hellaswag else [])]
        plain = accelerator.unwrap_model(model, keep_torch_compile=False)
        self._tasks = prepare_tasks(specs, source.tokenizer, plain, config.hellaswag_limit) if specs else []

    def measure(self) -> dict:
        """Validation loss and accuracies of the model as it is now, as one flat record; every rank calls it."""
        record = validation_losses(self.model, self.config, self.source, self._token_bytes)
        for task in self._tasks:
            record |= task.evaluate(self.model)
        return record

    def measure_average(self) -> dict:
        """The losses alone, as `val_loss_ema` and so on, while the model holds the averaged weights."""
        names = ("val_loss", "val_loss_masked", "perplexity", "bits_per_byte")
        found = validation_losses(self.model, self.config, self.source, self._token_bytes)
        return {f"{name}_ema": value for name, value in found.items() if name in names}

    def samples(self) -> list[str]:
        """Continuations of `sample_prompts`; [] on the other ranks, unless FSDP needs every rank to generate."""
        config, tokenizer = self.config, self.source.tokenizer
        plain = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        sharded = is_fsdp(plain)
        room = plain.config.n_positions > 1
        if not (config.sample_tokens and room and (self.accelerator.is_main_process or sharded)):
            return []
        texts = []
        with inference(self.model):
            for index, prompt in enumerate(config.sample_prompts):
                torch.manual_seed(step_seed(config.seed, index, 0))
                ids = [tokenizer.eos_token_id, *tokenizer(prompt)["input_ids"]]
                ids = [id for id in ids if id is not None][
                    -max(1, config.seq_len // 2) :
                ]  # not all have an end of text
                inputs = torch.tensor([ids], device=self.accelerator.device)  # (1, T)
                output = plain.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_length=min(len(ids) + config.sample_tokens, plain.config.n_positions),
                    do_sample=True,
                    top_k=50,
                    pad_token_id=tokenizer.eos_token_id,
                    synced_gpus=sharded,  # no rank stops while another still gathers; generate does not detect FSDP2
                )
                texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
        return texts


def bytes_of_tokens(source) -> torch.Tensor | None:
    """`token_byte_lengths` of the data's tokenizer; None where it does not know all tokens of the data.

    Then bytes are the split's average per token.
    """
    return token_byte_lengths(source.tokenizer) if len(source.tokenizer) >= source.vocab_size else None


def validation_losses(model, config, source, token_bytes: torch.Tensor | None) -> dict:
    """The losses with documents that see each other and, in a run that masks them, val_loss_masked beside them.

    {} where the data has no validation split.
    """
    record = _losses(model, config, source, token_bytes, None)
    if config.documents == "mask":
        masked = _losses(model, config, source, token_bytes, source.tokenizer.eos_token_id)
        names = (name for name in masked if name.startswith("val_loss"))
        record |= {name.replace("val_loss", "val_loss_masked"): masked[name] for name in names}
    return record


def _losses(model, config, source, token_bytes: torch.Tensor | None, eot_id: int | None) -> dict:
    """The losses; those of a recipe's sources as val_loss/NAME, and of their mixture unless there is `val_data`."""
    how = {"seq_len": config.seq_len, "batch_size": config.micro_batch_size, "tokens": config.val_tokens}
    how |= {"token_bytes": token_bytes, "eot_id": eot_id}
    splits = {name: part.validation for name, part in source.sources.items() if part.validation is not None}
    found = {name: validation_loss(model, split, **how) for name, split in splits.items()}
    if source.validation is not None:
        record = validation_loss(model, source.validation, **how)
    else:
        record = mixed(found, source.recipe.phases[-1].shares()) if found else {}
    return record | {f"val_loss/{name}": one["val_loss"] for name, one in found.items()}


def mixed(found: dict[str, dict], shares: dict) -> dict:
    """One record of the sources' validation losses: of a text that mixes them as the recipe's last phase does.

    The last phase is what the whole run is for, so one curve runs through all phases. Sources that it leaves out, and
    those without a validation split, do not count.
    """
    shares = {name: float(share) for name, share in shares.items() if name in found}
    if not shares:
        return {}
    parts = [(share / sum(shares.values()), found[name]) for name, share in shares.items()]
    nats = sum(share * one["val_loss"] for share, one in parts)
    text_bytes = None  # of one token of the mixture
    if all(one["bits_per_byte"] for _, one in parts):
        text_bytes = sum(share * one["val_loss"] / math.log(2) / one["bits_per_byte"] for share, one in parts)
    return {**loss_metrics(nats, 1, text_bytes), "val_tokens": sum(one["val_tokens"] for _, one in parts)}
