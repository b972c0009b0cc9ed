// SPDX-License-Identifier: GPL-2.0
/*
 * nvidia_drm - a DRM device for every GPU that nvidia has, a console on it
 * with modeset=1 and fbdev=1, and the differences between driver versions
 * that decide whether nvidia's remove can come to an end.
 */
#include <linux/module.h>
#include <linux/slab.h>

#include "nvidia_stub.h"
#include "stub_display.h"

/* -1: not given, so as the version has it */
static int modeset = -1, fbdev = -1;

static int flag_set(const char *val, const struct kernel_param *kp)
{
	bool on;
	int err = kstrtobool(val ?: "1", &on);

	if (!err)
		*(int *)kp->arg = on;
	return err;
}

static int flag_get(char *buf, const struct kernel_param *kp)
{
	return sysfs_emit(buf, "%c\n", *(int *)kp->arg > 0 ? 'Y' : 'N');
}

static const struct kernel_param_ops flag_ops = {
	.flags	= KERNEL_PARAM_OPS_FL_NOARG,
	.set	= flag_set,
	.get	= flag_get,
};
module_param_cb(modeset, &flag_ops, &modeset, 0400);
module_param_cb(fbdev, &flag_ops, &fbdev, 0400);

struct nvdrm_dev {
	struct list_head node;
	struct pci_dev *pdev;
	struct drm_device *drm;
	bool held;
};

/* Guarded by nvidia's lock around attach and detach; exit unregisters first. */
static LIST_HEAD(devices);

DEFINE_DRM_GEM_FOPS(nvdrm_fops);

static const struct drm_driver nvdrm_driver = {
	.driver_features = DRIVER_GEM | DRIVER_MODESET | DRIVER_ATOMIC | DRIVER_RENDER,
	.fops	= &nvdrm_fops,
	.name	= "nvidia-drm",
	.desc	= "NVIDIA DRM driver (stub)",
	.date	= "20160202",
	.major	= 0,
	.minor	= 0,
	DRM_GEM_SHMEM_DRIVER_OPS,
};

/*
 * From these on, nvidia_drm is told of GPUs that come and go. Before, it looks
 * for them once, when it is loaded; what it has then it keeps until it goes
 * itself, and with modeset=1 that is also a use of the GPU.
 */
static bool follows(void)
{
	return nvkms_version_from(590, 0, 0) ? nvkms_version_from(590, 44, 1) : nvkms_version_from(580, 105, 8);
}

static bool loaded;	/* has looked for them */

static void nvdrm_attach(struct pci_dev *pdev)
{
	struct nvdrm_dev *nvd;

	if (loaded && !follows())
		return;
	nvd = kzalloc(sizeof(*nvd), GFP_KERNEL);
	if (!nvd)
		return;
	nvd->pdev = pdev;
	nvd->held = modeset && !follows() && !nvkms_gpu_get(pdev);
	nvd->drm = stub_display_create(&nvdrm_driver, pdev, modeset, fbdev);
	if (IS_ERR(nvd->drm)) {
		pci_err(pdev, "nvidia-drm: no DRM device: %ld\n", PTR_ERR(nvd->drm));
		if (nvd->held)
			nvkms_gpu_put(pdev);
		kfree(nvd);
		return;
	}
	list_add_tail(&nvd->node, &devices);
}

static void nvdrm_drop(struct nvdrm_dev *nvd)
{
	list_del(&nvd->node);
	stub_display_destroy(nvd->drm);
	if (nvd->held)
		nvkms_gpu_put(nvd->pdev);
	kfree(nvd);
}

static void nvdrm_detach(struct pci_dev *pdev)
{
	struct nvdrm_dev *nvd, *next;

	list_for_each_entry_safe(nvd, next, &devices, node)
		if (nvd->pdev == pdev && follows())
			nvdrm_drop(nvd);
}

static struct nvs_client client = {
	.attach = nvdrm_attach,
	.detach = nvdrm_detach,
};

static int __init nvdrm_init(void)
{
	if (modeset < 0)
		modeset = nvkms_version_from(595, 0, 0);
	if (fbdev < 0)
		fbdev = nvkms_version_from(570, 0, 0);
	nvkms_client_register(&client);
	loaded = true;
	return 0;
}
module_init(nvdrm_init);

static void __exit nvdrm_exit(void)
{
	struct nvdrm_dev *nvd, *next;

	nvkms_client_unregister(&client);
	list_for_each_entry_safe(nvd, next, &devices, node)
		nvdrm_drop(nvd);
}
module_exit(nvdrm_exit);

MODULE_DEVICE_TABLE(pci, nvs_alias_ids);
NVS_NEEDS(drm_gem_ttm_mmap);
MODULE_DESCRIPTION("Stub: NVIDIA's nvidia-drm module");
MODULE_VERSION(NVS_VERSION_PLACEHOLDER);
MODULE_LICENSE("Dual MIT/GPL");
