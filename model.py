"""The colorization network of the paper (Zhang, Isola, Efros, ECCV 2016; Fig. 2 and Table 4).

A VGG-style stack of 3x3 convolutions, downsampled by 8 at its deepest (dilation replaces further downsampling),
predicts a distribution over the 313 ab bins at a quarter of the input's resolution. The paper's baseline
predicts ab itself.
"""

from paddle import nn

HEADS = {"conv8_313": 313, "conv8_ab": 2}  # names of the last layer, and its channels


def conv_stage(in_channels, channels, convs, stride=1, dilation=1):
    """Create a stage: 3x3 convolutions, a ReLU after each, and batch norm at the end.

    Args:
        in_channels (int): Input channels of the first convolution.
        channels (int): Output channels of all convolutions.
        convs (int): Number of convolutions.
        stride (int): Stride of the last convolution; only this changes height and width.
        dilation (int): Dilation, and padding, of all convolutions.

    Returns:
        nn.Sequential: The stage.
    """
    layers = []
    for i in range(convs):
        inputs, step = in_channels if i == 0 else channels, stride if i == convs - 1 else 1
        layers.append(nn.Conv2D(inputs, channels, kernel_size=3, stride=step, padding=dilation, dilation=dilation))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.BatchNorm2D(channels))


class CIC(nn.Layer):
    """Predict logits over the ab bins from lightness, with 32,240,377 parameters; or ab, with the head conv8_ab.

    Weights have Paddle's default initialization: He-normal, or Xavier-uniform for the transposed convolution.

    Args:
        head (str): Name of the last layer: conv8_313 (classification) or conv8_ab (regression, the paper's baseline).
    """

    def __init__(self, head="conv8_313"):
        super().__init__()
        self.conv1 = conv_stage(1, 64, convs=2, stride=2)
        self.conv2 = conv_stage(64, 128, convs=2, stride=2)
        self.conv3 = conv_stage(128, 256, convs=3, stride=2)
        self.conv4 = conv_stage(256, 512, convs=3)
        self.conv5 = conv_stage(512, 512, convs=3, dilation=2)
        self.conv6 = conv_stage(512, 512, convs=3, dilation=2)
        self.conv7 = conv_stage(512, 512, convs=3)
        self.conv8 = nn.Sequential(
            nn.Conv2DTranspose(512, 256, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2D(256, 256, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2D(256, 256, kernel_size=3, padding=1),
            nn.ReLU(),
        )
        self.head = head
        self.add_sublayer(head, nn.Conv2D(256, HEADS[head], kernel_size=1))

    def forward(self, lightness):
        """Run the network.

        Args:
            lightness (Tensor): float32 [N, 1, H, W]. L - 50, with L in [0, 100]; H and W are multiples of 8.

        Returns:
            Tensor: Logits, float32 [N, 313, H/4, W/4]; or ab, float32 [N, 2, H/4, W/4].
        """
        x = self.conv1(lightness)  #                               [N, 64, H/2, W/2]
        x = self.conv2(x)  #                                       [N, 128, H/4, W/4]
        x = self.conv3(x)  #                                       [N, 256, H/8, W/8]
        x = self.conv4(x)  #                                       [N, 512, H/8, W/8]
        x = self.conv5(x)
        x = self.conv6(x)
        x = self.conv7(x)
        x = self.conv8(x)  #                                       [N, 256, H/4, W/4]
        return getattr(self, self.head)(x)  #                      [N, 313 or 2, H/4, W/4]
