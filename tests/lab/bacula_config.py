# SPDX-License-Identifier: Apache-2.0
"""Configuration of the lab's Bacula; ``str.format`` fills it in.

One directive a line: some of Bacula's swallow whatever follows them.
"""

from __future__ import annotations

DIRECTOR = """\
Director {{
  Name = lab-dir
  DirAddresses = {{ ip = {{ addr = 127.0.0.1; port = {dir_port} }} }}
  QueryFile = "{base}/etc/query.sql"
  WorkingDirectory = "{base}/work"
  PidDirectory = "{base}/run"
  Maximum Concurrent Jobs = 20
  Password = "{password}"
  Messages = lab-messages
}}
Catalog {{
  Name = lab-catalog
  dbname = "lab"
  dbuser = "lab"
  dbpassword = ""
}}
Messages {{
  Name = lab-messages
  append = "{base}/log/jobs.log" = all, !skipped
  catalog = all, !skipped
}}
Client {{
  Name = lab-fd
  Address = 127.0.0.1
  FDPort = {fd_port}
  Catalog = lab-catalog
  Password = "{password}"
  Maximum Concurrent Jobs = 20
  AutoPrune = no
}}
JobDefs {{
  Name = lab-defaults
  Type = Backup
  Level = Full
  Client = lab-fd
  Storage = lab-storage-1
  Pool = lab-pool-1
  Messages = lab-messages
  Allow Mixed Priority = yes
}}
FileSet {{
  Name = lab-nothing
  Include {{
    Options {{
      signature = MD5
    }}
    File = /nonexistent
  }}
}}
Job {{
  Name = lab-restore
  Type = Restore
  Client = lab-fd
  Storage = lab-storage-1
  Pool = lab-pool-1
  Messages = lab-messages
  FileSet = lab-nothing
  Where = ""
  Maximum Concurrent Jobs = 20
}}
@|"sh -c 'cat {base}/etc/storages.d/*.conf 2>/dev/null || true'"
@|"sh -c 'cat {base}/etc/jobs.d/*.conf 2>/dev/null || true'"
"""

DIRECTOR_STORAGE = """\
Storage {{
  Name = lab-storage-{number}
  Address = 127.0.0.1
  SDPort = {sd_port}
  Password = "{password}"
  Device = lab-device-{number}
  Media Type = LabFile{number}
  Maximum Concurrent Jobs = 20
}}
Pool {{
  Name = lab-pool-{number}
  Pool Type = Backup
  LabelFormat = "Lab{number}-"
  AutoPrune = no
  Recycle = no
}}
"""

STORAGE = """\
Storage {{
  Name = lab-sd
  SDAddresses = {{ ip = {{ addr = 127.0.0.1; port = {sd_port} }} }}
  WorkingDirectory = "{base}/work"
  PidDirectory = "{base}/run"
  Maximum Concurrent Jobs = 20
}}
Director {{
  Name = lab-dir
  Password = "{password}"
}}
Messages {{
  Name = Standard
  director = lab-dir = all
}}
"""

DEVICE = """\
Device {{
  Name = lab-device-{number}
  Media Type = LabFile{number}
  Device Type = File
  Archive Device = "{base}/volumes"
  LabelMedia = yes
  Random Access = yes
  AutomaticMount = yes
  RemovableMedia = no
  AlwaysOpen = no
  Maximum Concurrent Jobs = 20
}}
"""

CLIENT = """\
FileDaemon {{
  Name = lab-fd
  FDAddresses = {{ ip = {{ addr = 127.0.0.1; port = {fd_port} }} }}
  WorkingDirectory = "{base}/work"
  PidDirectory = "{base}/run"
  Plugin Directory = "{plugin_dir}"
  Maximum Concurrent Jobs = 20
{pki}}}
Director {{
  Name = lab-dir
  Password = "{password}"
}}
Messages {{
  Name = Standard
  director = lab-dir = all, !skipped, !restored
}}
"""

PKI = """\
  PKI Signatures = yes
  PKI Encryption = yes
  PKI Keypair = "{base}/etc/fd-keypair.pem"
"""

CONSOLE = """\
Director {{
  Name = lab-dir
  DIRport = {dir_port}
  Address = 127.0.0.1
  Password = "{password}"
}}
"""

JOB = """\
FileSet {{
  Name = "{fileset}"
  Ignore FileSet Changes = yes
  Include {{
    Options {{
{options}
    }}
{plugins}
  }}
}}
Job {{
  Name = "{name}"
  JobDefs = lab-defaults
  FileSet = "{fileset}"
{directives}
}}
"""
