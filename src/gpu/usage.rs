//! The kernel's own word on whether anybody uses a driver: every open file and every mapping of its nodes holds a
//! reference on its module, also what no look at processes shows: an open that is not done yet, a descriptor on its way
//! through a socket. It tells how many, not who.

use crate::sys::Kernel;

/// References on a module that are not those of the modules that need it; none when the kernel does not tell.
pub fn references(kernel: &dyn Kernel, module: &str) -> Option<u64> {
    let count: u64 = kernel.text(&format!("/sys/module/{module}/refcnt"))?.trim().parse().ok()?;
    Some(count.saturating_sub(kernel.list(&format!("/sys/module/{module}/holders")).len() as u64))
}

/// Whether nobody has anything of these modules open.
pub fn are_idle(kernel: &dyn Kernel, modules: &[String]) -> bool {
    modules.iter().all(|module| references(kernel, module).is_some_and(|count| count <= own(module)))
}

/// What a module holds of itself. Since Linux 6.10 vfio has a file system of its own mounted as long as it has any device
/// (`vfio_fs_inode_new` in drivers/vfio/vfio_main.c). Before that a single reference is a container without a group: who has
/// a group or a device open holds two (`cdev_get` and `fops_get` in fs/char_dev.c).
fn own(module: &str) -> u64 {
    u64::from(module == "vfio")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Linux;

    #[test]
    fn what_other_modules_hold_is_nobodys_use() {
        let root = std::env::temp_dir().join(format!("gpu-handoff-usage-{}", std::process::id()));
        let module = root.join("sys/module/nvidia");
        std::fs::create_dir_all(module.join("holders/nvidia_uvm")).unwrap();
        let kernel = Linux::at(root.clone());
        let counted = |text: &str| {
            std::fs::write(module.join("refcnt"), text).unwrap();
            references(&kernel, "nvidia")
        };
        assert_eq!(references(&kernel, "nvidia"), None);
        assert_eq!(counted("1\n"), Some(0));
        assert!(are_idle(&kernel, &["nvidia".to_string()]));
        assert!(!are_idle(&kernel, &["nvidia".to_string(), "nvidia_uvm".to_string()]), "that one does not tell");
        assert_eq!(counted("3\n"), Some(2));
        assert!(!are_idle(&kernel, &["nvidia".to_string()]));
        // Its own file system; the open node of a device.
        let vfio = root.join("sys/module/vfio");
        std::fs::create_dir_all(vfio.join("holders/vfio_pci")).unwrap();
        for (count, is_idle) in [("1\n", true), ("2\n", true), ("3\n", false), ("4\n", false)] {
            std::fs::write(vfio.join("refcnt"), count).unwrap();
            assert_eq!(are_idle(&kernel, &["vfio".to_string()]), is_idle, "{count}");
        }
        // One that is just going.
        assert_eq!(counted("-1\n"), None);
        std::fs::remove_dir_all(root).unwrap();
    }
}
