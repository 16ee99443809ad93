"""The tiny checkpoint: a MiniMax-M3 in miniature, trained, inside the package.

It has M3's published layout and every part of its text model (dense and mixture-of-experts layers, full and
block-sparse attention, thinking and tool-call markers), at eight megabytes. It answers the small questions of
`m3dist.tiny.dialogues`, so a correct installation can be told from a broken one by its answers.
`python -m m3dist.tiny.train` makes it again.
"""

from pathlib import Path

PATH = Path(__file__).parent / "checkpoint"

DEMO_PROMPT = "My cat is called Miro. What is 7 + 5, and what is my cat called?"
DEMO_ANSWER = "The answer is 12. Your cat is called Miro."
