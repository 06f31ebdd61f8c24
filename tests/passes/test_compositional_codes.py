"""stub"""

OPTIONS = {"codebooks": 2, "codewords": 4, "beam": 2, "rounds": 1}
