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
    modules.iter().all(|module| references(kernel, module) == Some(0))
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
        // One that is just going.
        assert_eq!(counted("-1\n"), None);
        std::fs::remove_dir_all(root).unwrap();
    }
}
