"""The token viewer of a page: which responses it shows, and their numbers, packed for a browser.

`data.viewer_data` makes the data, and assets/viewer.js draws them. The parts in their order:

    sources.py   a store as a source: which segments are read, at most MOST_POSITIONS positions
    choose.py    which responses are shown: the worst ones, and some of prompts spread over the rest
    lists.py     both top lists of each position, cut to the first ids and their mass
    rows.py      the numbers of each position of the chosen responses
    texts.py     text of each id, or its bytes where a token is a part of a character
    measures.py  the metrics that a token is coloured by: units, edges of the scale, a sentence each
    columns.py   all of that as columns and a header
    pack.py      numbers as small integers, compressed
"""
