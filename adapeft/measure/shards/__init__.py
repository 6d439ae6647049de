"""One rank's slices of the parameters, and their gradients as the backward pass gives them."""
