"""Feature bits between a driver and a device (virtio 1.3, 2.2)."""

from __future__ import annotations

import logging

from vring_serial.device.base import VirtioDevice
from vring_serial.device.registers.state import DriverState
from vring_serial.errors import RemoteProtocolError
from vring_serial.proto.virtio import Feature, Status, feature_names
from vring_serial.ratelimit import RateLimitedLog

#: Offered by the registers themselves, whatever the device is.
_REGISTER_FEATURES = int(Feature.RING_RESET | Feature.VERSION_1)
#: Bits that mean something to legacy drivers alone (6.3).
_LEGACY_ONLY = int(Feature.NOTIFY_ON_EMPTY | Feature.ANY_LAYOUT)
# Numbers, all of them: the complement of a Feature has no bit that is unknown here.
_RING_PACKED = int(Feature.RING_PACKED)
_WORD = (1 << 32) - 1


def offered_features(device: VirtioDevice, *, packed: bool, notification_data: bool) -> int:
    """Return the feature bits that a device and its registers offer to modern drivers."""
    bits = (int(device.device_features) | _REGISTER_FEATURES) & ~_LEGACY_ONLY
    bits |= int(Feature.NOTIFICATION_DATA) if notification_data else 0
    return bits | _RING_PACKED if packed else bits & ~_RING_PACKED


def offered_legacy_features(device: VirtioDevice) -> int:
    """Return the feature bits that legacy drivers are offered: 0 to 31."""
    return int(device.device_features & _WORD | Feature.ANY_LAYOUT)


class FeatureNegotiation:
    """The features that a device and its registers offer, and those that a driver accepts.

    Args:
        device: gets the accepted bits that it offered itself.
        state: holds the driver's selections and bits.
        packed: offer RING_PACKED.
        notification_data: offer NOTIFICATION_DATA.
        log: gets a line about each refused or unusual choice.
    """

    def __init__(
        self,
        device: VirtioDevice,
        state: DriverState,
        *,
        packed: bool,
        notification_data: bool,
        log: RateLimitedLog,
    ) -> None:
        self._device = device
        self._state = state
        self._packed = packed
        self._notification_data = notification_data
        self._log = log

    @property
    def offered(self) -> int:
        """Feature bits for modern drivers."""
        return offered_features(
            self._device, packed=self._packed, notification_data=self._notification_data
        )

    @property
    def offered_legacy(self) -> int:
        """Feature bits for legacy drivers: 0 to 31."""
        return offered_legacy_features(self._device)

    def has(self, feature: int) -> bool:
        """Return whether the feature is accepted."""
        return bool(self._state.features & feature)

    # --- registers

    def read_device(self) -> int:
        """Return the offered word that device_feature_select selects; 0 beyond the last."""
        return self.offered >> 32 * self._state.device_feature_select & _WORD

    def read_device_legacy(self) -> int:
        """Return the offered word for legacy layouts that select words."""
        return 0 if self._state.device_feature_select else self.offered_legacy

    def read_driver(self) -> int:
        """Return the written word that driver_feature_select selects."""
        return self._state.features_written >> 32 * self._state.driver_feature_select & _WORD

    def write_driver(self, word: int) -> None:
        """Set the word that driver_feature_select selects; after FEATURES_OK it is too late."""
        state = self._state
        if state.driver_feature_select > 1 or self._device.status & Status.FEATURES_OK:
            return
        shift = 32 * state.driver_feature_select
        state.features_written = state.features_written & ~(_WORD << shift) | word << shift

    def write_legacy(self, word: int) -> None:
        """Set the bits that a legacy driver accepts; bits that were not offered are ignored."""
        self._state.features_written = word & self.offered_legacy

    # --- decisions

    def accept(self) -> bool:
        """Accept what the driver has written, if it may be; return whether it was."""
        wanted = self._state.features_written
        if wanted & ~self.offered or not wanted & Feature.VERSION_1:
            self._log.warning(
                "%s: the driver accepted features %#x, which must be some of %#x with VERSION_1",
                self._device.name,
                wanted,
                self.offered,
            )
            return False
        try:
            self._device.set_driver_features(wanted & self._device.device_features)
        except RemoteProtocolError as error:
            self._log.warning("%s", error)
            return False
        self._state.features = wanted
        if own := wanted & ~int(self._device.device_features):
            text = "%s: the driver accepted of the registers %s"
            self._log.log(logging.INFO, text, self._device.name, feature_names(own))
        return True

    def accept_legacy(self) -> None:
        """Accept what a legacy driver has written; it has no FEATURES_OK (3.1.2)."""
        # The driver may have written others through the modern interface before.
        self._state.features_written &= self.offered_legacy
        self._device.set_driver_features(
            self._state.features_written & self._device.device_features
        )
        self._state.features = self._state.features_written
