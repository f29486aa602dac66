"""The project's numbers as modules of `evaluate`, usable without network.

    from gpt2repro.evaluation.metrics.hellaswag import HellaSwag  # the class
    evaluate.load("gpt2repro/evaluation/metrics/hellaswag.py")    # or by file, as with any local module

Each takes sums over a model's forward passes, which `gpt2repro.evaluation.multiple_choice.score` and
`gpt2repro.evaluation.losses` compute. `evaluate` accumulates them over batches (`add_batch`) and over processes
(`num_process`, `process_id`, `experiment_id`).
"""
