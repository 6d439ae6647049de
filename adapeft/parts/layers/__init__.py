"""The modules of parts: what a layer of the model becomes when something in or after it is trained."""
