# SPDX-License-Identifier: Apache-2.0
"""Descriptions of the tiny guest as VMware and Hyper-V write them, and increments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pveplug.images.blockdelta import BlockDeltaWriter, DeltaHeader

MAC = "00:50:56:aa:bb:01"

VMX = """\
.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "19"
displayName = "{name}"
guestOS = "debian11-64"
firmware = "{firmware}"
memSize = "384"
numvcpus = "1"
cpuid.coresPerSocket = "1"
scsi0.present = "TRUE"
scsi0.virtualDev = "pvscsi"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "{disk}"
ethernet0.present = "TRUE"
ethernet0.virtualDev = "vmxnet3"
ethernet0.networkName = "VM Network"
ethernet0.addressType = "static"
ethernet0.address = "{mac}"
annotation = "made for a test"
"""

OVF = """\
<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"
  xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
  xmlns:vmw="http://www.vmware.com/schema/ovf"
  xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
  xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
  <References><File ovf:href="{disk}" ovf:id="file1"/></References>
  <DiskSection><Info>Disks</Info>
    <Disk ovf:capacity="{size}" ovf:diskId="vmdisk1" ovf:fileRef="file1"/>
  </DiskSection>
  <NetworkSection><Info>Networks</Info><Network ovf:name="VM Network"/></NetworkSection>
  <VirtualSystem ovf:id="{name}"><Info>A VM</Info><Name>{name}</Name>
    <OperatingSystemSection ovf:id="96" vmw:osType="debian11_64Guest"><Info/>
    </OperatingSystemSection>
    <VirtualHardwareSection><Info/>
      <System><vssd:VirtualSystemType>vmx-19</vssd:VirtualSystemType></System>
      <Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType>
        <rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
      <Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>
        <rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType>
        <rasd:VirtualQuantity>384</rasd:VirtualQuantity></Item>
      <Item><rasd:Address>0</rasd:Address><rasd:InstanceID>3</rasd:InstanceID>
        <rasd:ResourceSubType>VirtualSCSI</rasd:ResourceSubType>
        <rasd:ResourceType>6</rasd:ResourceType></Item>
      <Item><rasd:AddressOnParent>0</rasd:AddressOnParent>
        <rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource>
        <rasd:InstanceID>4</rasd:InstanceID><rasd:Parent>3</rasd:Parent>
        <rasd:ResourceType>17</rasd:ResourceType></Item>
      <vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="{firmware}"/>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"""

HYPERV = """\
<?xml version="1.0" encoding="UTF-16"?>
<configuration>
  <properties>
    <name type="string">{name}</name>
    <subtype type="integer">{subtype}</subtype>
    <version type="integer">2304</version>
  </properties>
  <settings>
    <memory><bank>
      <dynamic_memory_enabled type="bool">False</dynamic_memory_enabled>
      <size type="integer">384</size>
    </bank></memory>
    <processors><count type="integer">1</count></processors>
  </settings>
  <{bus}>
    <controller0><drive0>
      <pathname type="string">C:\\VMs\\{name}\\Virtual Hard Disks\\{disk}</pathname>
      <type type="string">VHD</type>
    </drive0></controller0>
  </{bus}>
  <_11111111-2222-3333-4444-555555555555_>
    <FriendlyName type="string">Network Adapter</FriendlyName>
    <MacAddress type="string">00155DAABB02</MacAddress>
    <IsConnected type="bool">True</IsConnected>
    <Connection><AltSwitchName type="string">External</AltSwitchName></Connection>
  </_11111111-2222-3333-4444-555555555555_>
</configuration>
"""
_IDE = "_83f8638b-8dca-4152-9eda-2ca8b33039b4_"
_SCSI = "_d422512d-2bf2-4752-809d-7b82b5fcb1b4_"


def vmx(name: str, disk: str, firmware: str = "bios") -> bytes:
    """Return a .vmx of a VM with one disk on a paravirtual SCSI controller."""
    text = VMX.format(name=name, disk=disk, firmware=firmware, mac=MAC)
    return text.encode()


def ovf(name: str, disk: str, size: int, firmware: str = "bios") -> bytes:
    """Return an .ovf of the same, with two processors."""
    return OVF.format(name=name, disk=disk, size=size, firmware=firmware).encode()


def hyperv(name: str, disk: str, generation: int) -> bytes:
    """Return the configuration of an exported Hyper-V VM."""
    bus = _IDE if generation == 1 else _SCSI
    text = HYPERV.format(name=name, disk=disk, subtype=generation - 1, bus=bus)
    return text.encode("utf-16")


def sidecar(name: str, disk: str) -> bytes:
    """Return what describes a generation 2 VM, whose own file is a binary one."""
    value = {
        "schema": "pveplug-guest/1",
        "name": name,
        "firmware": "uefi",
        "secure_boot": False,
        "cores": 1,
        "memory_mib": 384,
        "os_id": "debian12-64",
        "machine": ["hyper-v generation 2"],
        "disks": [{"bus": "scsi", "controller": 0, "unit": 0, "file": disk}],
        "nics": [{"model": "synthetic", "mac": MAC, "network": "External"}],
    }
    return json.dumps(value).encode()


def delta(
    path: Path,
    parent: str | None,
    identity: str,
    size: int,
    runs: Sequence[tuple[int, bytes | int]],
) -> Path:
    """Write a container: bytes are data, a number is so many zeroes."""
    writer = BlockDeltaWriter()
    parts = [writer.begin(DeltaHeader(size, path.stem, identity, parent))]
    for offset, run in runs:
        if isinstance(run, int):
            parts.append(writer.zero(offset, run))
        else:
            parts.append(writer.data(offset, run))
    parts.append(writer.end())
    path.write_bytes(b"".join(parts))
    return path
