"""Graph passes on ``onnx_ir``: from an exported graph to one whose linear layers are ``BinaryBasisMatMul`` nodes.

In the order in which they run:

1. ``prepare``: inline functions, lift constant weights to initializers
2. ``linears``: find the linear layers (an analysis, it changes nothing)
3. ``normalize``: bring the chosen ones to MatMul with an optional Add
4. ``binarize``: MatMul and Add become one ``BinaryBasisMatMul`` with packed initializers
5. ``fuse``: nodes that share their input become one, with a Split behind it
6. ``function_body``: attach the operator's definition in plain ONNX operators
7. ``verify``: refuse anything that is not legal in a finished file
"""
