"""Between the messages of the contract and the values of the house, both ways; for every door that speaks them."""
