"""The models of the support matrix, of every kind there is."""

from __future__ import annotations

from typing import NamedTuple

BITS = 4


class Model(NamedTuple):
    """A row: the smallest images that make sense, and the bits of weights and activations."""

    name: str
    kind: str
    size: int = 64
    bits: int = BITS


MODELS = [
    Model("resnet20_cifar", "ResNet", 32, 2),
    Model("resnet18", "ResNet", 64, 2),
    Model("resnet50", "ResNet", 64, 2),
    Model("resnet18d", "ResNet-D"),
    Model("resnext50_32x4d", "ResNeXt"),
    Model("wide_resnet50_2", "Wide ResNet"),
    Model("res2net50_14w_8s", "Res2Net"),
    Model("resnetv2_50", "pre-activation ResNet"),
    Model("seresnet18", "SE-ResNet"),
    Model("resnetrs50", "ResNet-RS"),
    Model("ecaresnet26t", "ECA-ResNet"),
    Model("skresnet18", "SK-ResNet"),
    Model("resnest14d", "ResNeSt"),
    Model("nf_resnet26", "normalizer-free ResNet"),
    Model("regnetx_002", "RegNetX"),
    Model("regnety_002", "RegNetY"),
    Model("torchvision/regnet_y_400mf", "RegNetY"),
    Model("gernet_s", "GENet"),
    Model("mobilenetv1_100", "MobileNetV1"),
    Model("mobilenetv2_100", "MobileNetV2"),
    Model("torchvision/mobilenet_v2", "MobileNetV2"),
    Model("mobilenetv3_small_100", "MobileNetV3"),
    Model("torchvision/mobilenet_v3_large", "MobileNetV3"),
    Model("mobilenetv4_conv_small", "MobileNetV4"),
    Model("mobilenetv4_hybrid_medium", "MobileNetV4 hybrid"),
    Model("lcnet_050", "LCNet"),
    Model("efficientnet_b0", "EfficientNet"),
    Model("torchvision/efficientnet_b0", "EfficientNet"),
    Model("tf_efficientnet_lite0", "EfficientNet-Lite"),
    Model("efficientnetv2_rw_t", "EfficientNetV2"),
    Model("tinynet_e", "TinyNet"),
    Model("mixnet_s", "MixNet"),
    Model("mnasnet_small", "MNASNet"),
    Model("torchvision/mnasnet0_5", "MNASNet"),
    Model("fbnetc_100", "FBNet"),
    Model("hardcorenas_a", "HardCoRe-NAS"),
    Model("rexnet_100", "ReXNet"),
    Model("ghostnet_100", "GhostNet"),
    Model("ghostnetv2_100", "GhostNetV2"),
    Model("torchvision/shufflenet_v2_x0_5", "ShuffleNetV2"),
    Model("torchvision/squeezenet1_1", "SqueezeNet"),
    Model("vgg11_bn", "VGG"),
    Model("torchvision/vgg11", "VGG"),
    Model("torchvision/alexnet", "AlexNet"),
    Model("densenet121", "DenseNet"),
    Model("torchvision/googlenet", "GoogLeNet"),
    Model("inception_v3", "Inception v3", 96),
    Model("torchvision/inception_v3", "Inception v3", 96),
    Model("inception_v4", "Inception v4", 96),
    Model("inception_resnet_v2", "Inception-ResNet", 96),
    Model("legacy_xception", "Xception"),
    Model("repvgg_a0", "RepVGG"),
    Model("mobileone_s0", "MobileOne"),
    Model("repvit_m0_9", "RepViT"),
    Model("fastvit_t8", "FastViT"),
    Model("dla34", "DLA"),
    Model("dpn68", "DPN"),
    Model("cspresnet50", "CSP-ResNet"),
    Model("cspdarknet53", "CSP-DarkNet"),
    Model("darknet53", "DarkNet"),
    Model("hrnet_w18_small", "HRNet"),
    Model("ese_vovnet19b_dw", "VoVNet"),
    Model("selecsls42", "SelecSLS"),
    Model("tresnet_m", "TResNet"),
    Model("hgnetv2_b0", "HGNetV2"),
    Model("starnet_s1", "StarNet"),
    Model("convmixer_768_32", "ConvMixer"),
    Model("convnext_atto", "ConvNeXt"),
    Model("torchvision/convnext_tiny", "ConvNeXt"),
    Model("inception_next_atto", "InceptionNeXt"),
    Model("poolformer_s12", "PoolFormer"),
    Model("mambaout_femto", "MambaOut"),
    Model("mixer_s32_224", "MLP-Mixer", 224),
    Model("resmlp_12_224", "ResMLP", 224),
    Model("vit_tiny_patch16_224", "ViT", 64),
    Model("torchvision/vit_b_16", "ViT", 64),
    Model("deit_tiny_patch16_224", "DeiT", 64),
    Model("deit3_small_patch16_224", "DeiT III", 64),
    Model("swin_tiny_patch4_window7_224", "Swin", 56),
    Model("mobilevit_xxs", "MobileViT"),
    Model("edgenext_xx_small", "EdgeNeXt"),
    Model("efficientvit_b0", "EfficientViT"),
    Model("levit_128s", "LeViT", 224),
]
