"""The project's numbers as modules of `evaluate`, usable without network.

    from gpt2repro.evaluation.metrics.hellaswag import HellaSwag  # the class
    evaluate.load("gpt2repro/evaluation/metrics/hellaswag.py")    # or by file, as with any local module

Each takes sums that a model's forward passes gave (see `gpt2repro.evaluation.multiple_choice.score` and
`gpt2repro.evaluation.losses`), so accumulation over batches (`add_batch`) and processes (`num_process`, `process_id`,
`experiment_id`) is `evaluate`'s.
"""
