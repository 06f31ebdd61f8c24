"""Word vectors: files, codes and compressed models, with the names of gensim's `KeyedVectors`."""

from plmcc.vectors.codes import Codes
from plmcc.vectors.keyed import Score, Vectors, analogy, evaluate
from plmcc.vectors.load import load

__all__ = ["Codes", "Score", "Vectors", "analogy", "evaluate", "load"]
