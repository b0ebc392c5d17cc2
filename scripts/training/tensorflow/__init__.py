"""The parts of `scripts/train_keras.py` and `scripts/train_tf.py` that are TensorFlow's."""
