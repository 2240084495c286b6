"""What a loss may have computed: the catalogue of mistakes and the fit that names them."""
