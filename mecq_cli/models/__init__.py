"""Models of timm and torchvision with their weights, preprocessing and classes.

    loading          name -> LoadedModel: the one call that most need
    libraries        what timm and torchvision know of a model, and how each builds it
    hub              where published weights lie, and whether they can be had
    weights          weight files of other people, read without trust
    classes          class folders <-> outputs of the model
    preprocessing    image -> input, as plain values
    cifar_resnet     the CIFAR ResNets, registered with timm

Nothing is imported here: `preprocessing` is for those, too, who can do without torch.
"""
