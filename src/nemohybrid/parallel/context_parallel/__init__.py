"""Ranks that share the tokens of a row: context parallelism.

Each of c ranks holds an equal run of every row, in order. What looks across tokens travels in one of two ways:

              attention                                    Mamba-2
  heads       all_to_all: every rank takes all tokens      all_to_all: the same, with its convolution
              of some heads (arXiv 2309.14509)
  tokens      ring: keys and values go round               states: what a rank leaves is passed on, and the inputs
              (arXiv 2310.01889), halves balanced          of the convolution from the left neighbour

All of them send with one operator, whose way back is the same operator with the lists exchanged, so that every rank takes part
in the same collectives forward and backward, whatever it has to send.
"""
