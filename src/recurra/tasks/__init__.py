"""Applications, one a file: model, data, loss, figures and prediction."""
