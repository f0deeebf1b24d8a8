"""Matrix products in 8 bits: `train.products` of the run YAML.

      e4m3.py    encode, decode   values -> E4M3 codes with power-of-two scales: the definition
      recipe.py  EightBit         how a product is computed
      linear.py  linear           that of a linear layer, differentiable
      layers.py  put_products     which products of a model are in 8 bits, and their shapes
      choice.py  choose_products  what runs on this machine, and why nothing faster does

Decisions
    - The definition is an emulation: round both operands, then today's product in the working
      precision. It runs everywhere. A kernel is held to it.
    - The product of the forward and that for the gradient of the input are in 8 bits. The gradient
      of a weight is not, and takes both operands as they were before rounding.
    - Rounding has the gradient 1 (straight through).
    - Each product rounds its own operands: the weights of the second are the transposed ones, whose
      scales run along the other axis.
    - Only training rounds. A model in evaluation mode, and so the guard and samples, computes in
      the working precision, because that is how an export is served.
"""
