"""``hmmnet demo``: the whole machine at work on real text, in ten seconds, with every result checked.

`data` reads the text and lays out what the devices share, `answers` computes what must come out by plain Python, `steps` runs the machine,
`story` holds the sentences, `screen` prints. `steps` knows nothing of the screen: it tells a `Teller` what happened.
"""
