//! What Proxmox VE wrote down: guest configurations and resource mappings. Pure parsers, as lenient as Proxmox's own.
