"""What the model runners add: the requests of a worker and the steps made of them."""
