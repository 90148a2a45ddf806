"""Images and boxes: annotation files into one packed table, the table into padded batches (imports no torch).

sources.open_data("shapes", seed=0)   a COCO or VOC folder, a dataset YAML or drawn images, as one table per split
loader.train_batches(table, config, start=0, steps=100)
loader.eval_batches(table, config)
python -m core.data check|shapes
"""
