// SPDX-License-Identifier: GPL-2.0
/*
 * fakeid - make emulated PCI functions say that they are an NVIDIA card.
 *
 * Loaded in the initramfs, before udev looks at the bus, so that the rest of
 * the boot (modaliases, driver matching, sysfs) is that of a machine which
 * has the card. Configuration space still shows the emulated device.
 */
#include <linux/module.h>
#include <linux/pci.h>

#define MAX_SLOTS 8

static char *slots[MAX_SLOTS];
static int nslots;
module_param_array(slots, charp, &nslots, 0444);
MODULE_PARM_DESC(slots, "slots to change, each as DDDD:BB:DD");

static ushort display = 0x2684;
module_param(display, ushort, 0444);
MODULE_PARM_DESC(display, "device id of the display function");

static ushort audio = 0x22ba;
module_param(audio, ushort, 0444);
MODULE_PARM_DESC(audio, "device id of the audio function");

static int fake_function(int domain, int bus, unsigned int devfn, u16 device)
{
	struct pci_dev *pdev = pci_get_domain_bus_and_slot(domain, bus, devfn);

	if (!pdev)
		return -ENODEV;
	pdev->vendor = PCI_VENDOR_ID_NVIDIA;
	pdev->device = device;
	kobject_uevent(&pdev->dev.kobj, KOBJ_ADD);
	pci_info(pdev, "fakeid: now 10de:%04x\n", device);
	pci_dev_put(pdev);
	return 0;
}

static int __init fakeid_init(void)
{
	int i, err;

	for (i = 0; i < nslots; i++) {
		unsigned int domain, bus, dev;

		if (sscanf(slots[i], "%x:%x:%x", &domain, &bus, &dev) != 3)
			return -EINVAL;
		err = fake_function(domain, bus, PCI_DEVFN(dev, 0), display);
		if (!err)
			err = fake_function(domain, bus, PCI_DEVFN(dev, 1), audio);
		if (err) {
			pr_err("fakeid: %s has no two functions\n", slots[i]);
			return err;
		}
	}
	return 0;
}
module_init(fakeid_init);

/* No exit: an id does not change back on a real machine either. */
MODULE_DESCRIPTION("Stub: NVIDIA ids for emulated PCI functions");
MODULE_LICENSE("GPL");
