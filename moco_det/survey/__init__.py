"""A first look at a data set: what it holds, how it looks, and its conversion to COCO's format."""
