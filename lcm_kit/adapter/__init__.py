"""What is trained on a UNet, the roles that it plays in a step, and the folder that holds it."""
