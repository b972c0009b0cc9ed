// SPDX-License-Identifier: GPL-2.0
/*
 * nvidia_modeset - sits between nvidia and nvidia_drm, as in the real stack,
 * so that module dependencies, holders and the order of unloading are right.
 */
#include <linux/cdev.h>
#include <linux/fs.h>
#include <linux/module.h>

#include "nvidia_stub.h"

bool nvkms_version_from(unsigned int a, unsigned int b, unsigned int c)
{
	return nvs_version_from(a, b, c);
}
EXPORT_SYMBOL_GPL(nvkms_version_from);

void nvkms_client_register(struct nvs_client *client)
{
	nvs_client_register(client);
}
EXPORT_SYMBOL_GPL(nvkms_client_register);

void nvkms_client_unregister(struct nvs_client *client)
{
	nvs_client_unregister(client);
}
EXPORT_SYMBOL_GPL(nvkms_client_unregister);

int nvkms_gpu_get(struct pci_dev *pdev)
{
	return nvs_gpu_get(pdev);
}
EXPORT_SYMBOL_GPL(nvkms_gpu_get);

void nvkms_gpu_put(struct pci_dev *pdev)
{
	nvs_gpu_put(pdev);
}
EXPORT_SYMBOL_GPL(nvkms_gpu_put);

static const struct file_operations nvkms_fops = { .owner = THIS_MODULE };
static struct cdev nvkms_cdev;	/* without an owner: an open node counts once */

static int __init nvkms_init(void)
{
	dev_t dev = MKDEV(NVS_MAJOR, NVS_MINOR_MODESET);
	int err = register_chrdev_region(dev, 1, "nvidia-modeset");

	if (err)
		return err;
	cdev_init(&nvkms_cdev, &nvkms_fops);
	err = cdev_add(&nvkms_cdev, dev, 1);
	if (err)
		unregister_chrdev_region(dev, 1);
	return err;
}
module_init(nvkms_init);

static void __exit nvkms_exit(void)
{
	cdev_del(&nvkms_cdev);
	unregister_chrdev_region(MKDEV(NVS_MAJOR, NVS_MINOR_MODESET), 1);
}
module_exit(nvkms_exit);

NVS_NEEDS(acpi_video_get_edid);
MODULE_DESCRIPTION("Stub: NVIDIA's nvidia-modeset module");
MODULE_VERSION(NVS_VERSION_PLACEHOLDER);
MODULE_LICENSE("Dual MIT/GPL");
