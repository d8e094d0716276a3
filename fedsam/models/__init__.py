"""Networks: one file a model, made from an image's shape and the number of classes."""
