// SPDX-License-Identifier: GPL-2.0
/*
 * fakeid - make emulated PCI functions say that they are an NVIDIA card.
 *
 * Loaded in the initramfs, before udev looks at the bus, so that the rest of
 * the boot (modaliases, driver matching, sysfs) is that of a machine which
 * has the card. Configuration space still shows the emulated device.
 *
 * NVIDIA's own driver looks further: with boot0= it finds what it asks for
 * before it binds. The stubs ask for nothing, and get nothing: with it, the
 * first page of what QEMU's VGA shows is no picture any more.
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

static uint boot0;
module_param(boot0, uint, 0444);
MODULE_PARM_DESC(boot0, "what the display function's first register says of the chip (0: no registers)");

/* NVIDIA's PMC_BOOT_42: the same chip and revision, arranged in another way. */
#define BOOT_42		0xa00
#define BOOT_42_OF(b)	(((b) & 0x1ff00000) | ((b) & 0xff) << 12)

/*
 * What NVIDIA's probe wants of a card. BAR 0 of QEMU's VGA is plain memory
 * and keeps what is written there, also while a VM has the card: QEMU resets
 * only the registers in BAR 2.
 */
static int fake_registers(int domain, int bus, unsigned int devfn)
{
	struct pci_dev *pdev = pci_get_domain_bus_and_slot(domain, bus, devfn);
	void __iomem *regs = NULL;
	u16 cmd;

	/* From 580 on, three BARs that are valid; without flags no one else looks at it. */
	if (pdev && !pci_resource_len(pdev, 1)) {
		pdev->resource[1].start = pci_resource_start(pdev, 2);
		pdev->resource[1].end = pci_resource_end(pdev, 2);
		pdev->resource[1].flags = 0;
	}
	if (pdev)
		regs = ioremap(pci_resource_start(pdev, 0), PAGE_SIZE);
	if (regs) {
		pci_read_config_word(pdev, PCI_COMMAND, &cmd);
		pci_write_config_word(pdev, PCI_COMMAND, cmd | PCI_COMMAND_MEMORY);
		memset_io(regs, 0, PAGE_SIZE);
		writel(boot0, regs);
		writel(BOOT_42_OF(boot0), regs + BOOT_42);
		iounmap(regs);
	}
	pci_dev_put(pdev);
	return regs ? 0 : -ENOMEM;
}

/* An interrupt: QEMU's VGA has none. It is asked for, but never comes. */
static void fake_interrupt(int domain, int bus, unsigned int devfn)
{
	struct pci_dev *pdev = pci_get_domain_bus_and_slot(domain, bus, devfn);
	struct pci_dev *sound = pci_get_domain_bus_and_slot(domain, bus, devfn + 1);

	if (pdev && sound && !pdev->irq)
		pdev->irq = sound->irq;
	pci_dev_put(sound);
	pci_dev_put(pdev);
}

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
		if (!err)
			fake_interrupt(domain, bus, PCI_DEVFN(dev, 0));
		if (!err && boot0)
			err = fake_registers(domain, bus, PCI_DEVFN(dev, 0));
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
