"""What both engines of an offloaded model share: experts in host memory, slots, policy, the recorded run."""
