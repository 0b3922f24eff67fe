"""What happens, in the data's order:

    prompts -> rollout -> store -> score -> store -> batches -> objective -> student -> next version

Read the files in that order. `rollout`, `score` and `train` never import each other: they meet in
the store. For a training loop of one's own: `store.open_store`, `rows.batches.batches`,
`objectives.find_preset` and `training.row_loss.row_loss` are enough.
"""
