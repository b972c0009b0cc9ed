// SPDX-License-Identifier: GPL-2.0
/*
 * nouveau - stand-in for the free driver: a PCI driver with a DRM device and
 * a console, whose remove never waits. An open DRM node keeps the module.
 */
#include <linux/module.h>

#include "stub_display.h"

DEFINE_DRM_GEM_FOPS(nouveau_fops);

static const struct drm_driver nouveau_drm_driver = {
	.driver_features = DRIVER_GEM | DRIVER_MODESET | DRIVER_ATOMIC | DRIVER_RENDER,
	.fops	= &nouveau_fops,
	.name	= "nouveau",
	.desc	= "nVidia Riva/TNT/GeForce/Quadro/Tesla/Tegra K1+ (stub)",
	.date	= "20120801",
	.major	= 1,
	.minor	= 4,
	DRM_GEM_SHMEM_DRIVER_OPS,
};

static int nouveau_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct drm_device *drm;
	int err;

	err = pci_enable_device(pdev);
	if (err)
		return err;
	drm = stub_display_create(&nouveau_drm_driver, pdev, true, true);
	if (IS_ERR(drm)) {
		pci_disable_device(pdev);
		return PTR_ERR(drm);
	}
	pci_set_drvdata(pdev, drm);
	return 0;
}

static void nouveau_remove(struct pci_dev *pdev)
{
	stub_display_destroy(pci_get_drvdata(pdev));
	pci_set_drvdata(pdev, NULL);
	pci_disable_device(pdev);
}

static const struct pci_device_id nouveau_ids[] = {
	{ PCI_DEVICE(PCI_VENDOR_ID_NVIDIA, PCI_ANY_ID),
	  .class = PCI_BASE_CLASS_DISPLAY << 16, .class_mask = 0xff << 16 },
	{ }
};
MODULE_DEVICE_TABLE(pci, nouveau_ids);

static struct pci_driver nouveau_driver = {
	.name		= "nouveau",
	.id_table	= nouveau_ids,
	.probe		= nouveau_probe,
	.remove		= nouveau_remove,
};
module_pci_driver(nouveau_driver);

MODULE_DESCRIPTION("Stub: nouveau");
MODULE_LICENSE("GPL");
