"""`m3dist bench`: how fast a model runs here, where the time goes, and how mlx-lm does on the same weights.

program.py is what every rank runs. Without MLX: subject.py says which model is measured, statistics.py makes figures of
runs, report.py and plot.py show them, and cutoff.py sees to it that a bench which is ended early shows what it has.
With MLX: weights.py makes weights without a checkpoint, runners.py times ours, peer.py mlx-lm's, machine.py measures
the machine itself.

links.py is `m3dist bench links`, which needs no model; links_report.py, without MLX, shows what it measured.
"""
