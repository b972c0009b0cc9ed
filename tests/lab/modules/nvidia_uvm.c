// SPDX-License-Identifier: GPL-2.0
/*
 * nvidia_uvm - the module with a dynamic major. An open node holds this
 * module and so, through the dependency, nvidia; it does not count as a use
 * of a GPU (the real one counts a GPU once a program registers it).
 */
#include <linux/cdev.h>
#include <linux/fs.h>
#include <linux/module.h>

#include "nvidia_stub.h"

#define UVM_MINORS 2	/* 0 nvidia-uvm, 1 nvidia-uvm-tools */

static dev_t uvm_dev;
static struct cdev uvm_cdev;
static const struct file_operations uvm_fops = { .owner = THIS_MODULE };

static int __init uvm_init(void)
{
	int err = alloc_chrdev_region(&uvm_dev, 0, UVM_MINORS, "nvidia-uvm");

	if (err)
		return err;
	cdev_init(&uvm_cdev, &uvm_fops);
	uvm_cdev.owner = THIS_MODULE;
	err = cdev_add(&uvm_cdev, uvm_dev, UVM_MINORS);
	if (err) {
		unregister_chrdev_region(uvm_dev, UVM_MINORS);
		return err;
	}
	pr_info("nvidia-uvm: Loaded the UVM driver, major device number %d, driver %s.\n",
		MAJOR(uvm_dev), nvs_version());
	return 0;
}
module_init(uvm_init);

static void __exit uvm_exit(void)
{
	cdev_del(&uvm_cdev);
	unregister_chrdev_region(uvm_dev, UVM_MINORS);
	pr_info("nvidia-uvm: Unloaded the UVM driver.\n");
}
module_exit(uvm_exit);

MODULE_DESCRIPTION("Stub: NVIDIA's nvidia-uvm module");
MODULE_VERSION(NVS_VERSION_PLACEHOLDER);
MODULE_LICENSE("Dual MIT/GPL");
