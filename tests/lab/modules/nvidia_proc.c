// SPDX-License-Identifier: GPL-2.0
/* /proc/driver/nvidia, in the format of the real driver. */
#include <linux/moduleparam.h>
#include <linux/seq_file.h>

#include "nvidia_stub.h"

static uint NVreg_ModifyDeviceFiles = 1;
module_param(NVreg_ModifyDeviceFiles, uint, 0);
static uint NVreg_DeviceFileUID;
module_param(NVreg_DeviceFileUID, uint, 0);
static uint NVreg_DeviceFileGID;
module_param(NVreg_DeviceFileGID, uint, 0);
static uint NVreg_DeviceFileMode = 0666;
module_param(NVreg_DeviceFileMode, uint, 0);

static struct proc_dir_entry *top, *gpus;

static int version_show(struct seq_file *m, void *v)
{
	seq_printf(m, "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  %s  Release Build  (lab@gpu-handoff)  Fri Nov 20 12:00:00 UTC 2026\n",
		   nvs_version());
	seq_puts(m, "GCC version:  gcc version " __VERSION__ "\n");
	return 0;
}

static int params_show(struct seq_file *m, void *v)
{
	seq_puts(m, "ResmanDebugLevel: 4294967295\nRmLogonRC: 1\n");
	seq_printf(m, "ModifyDeviceFiles: %u\n", NVreg_ModifyDeviceFiles);
	seq_printf(m, "DeviceFileUID: %u\n", NVreg_DeviceFileUID);
	seq_printf(m, "DeviceFileGID: %u\n", NVreg_DeviceFileGID);
	seq_printf(m, "DeviceFileMode: %u\n", NVreg_DeviceFileMode);
	seq_puts(m, "InitializeSystemMemoryAllocations: 1\n");
	seq_puts(m, "UsePageAttributeTable: 4294967295\nEnableMSI: 1\n");
	seq_puts(m, "PreserveVideoMemoryAllocations: 0\nDynamicPowerManagement: 3\n");
	seq_puts(m, "RegisterPCIDriver: 1\nExcludedGpus: \"\"\n");
	return 0;
}

/* Files that are there, and say nothing. */
static int nothing_show(struct seq_file *m, void *v)
{
	return 0;
}

static int registry_show(struct seq_file *m, void *v)
{
	seq_puts(m, "Binary: \"\"\n");
	return 0;
}

/* Model, UUID and firmware are asked of the resource manager, which is busy while it starts any GPU. */
static int information_show(struct seq_file *m, void *v)
{
	struct nvs_gpu *gpu = m->private;
	struct pci_dev *pdev = gpu->pdev;

	nvs_ask_resource_manager();
	seq_puts(m, "Model: \t\t NVIDIA GeForce RTX 4090\n");
	seq_printf(m, "IRQ:   \t\t %u\n", pdev->irq);
	/* Made of the address, so it stays the same when minors swap. */
	seq_printf(m, "GPU UUID: \t GPU-1ab00000-%04x-%04x-%04x-000000000000\n",
		   pci_domain_nr(pdev->bus), pdev->bus->number, pdev->devfn);
	seq_puts(m, "Video BIOS: \t 95.02.3c.00.8c\n");
	seq_puts(m, "Bus Type: \t PCIe\n");
	seq_puts(m, "DMA Size: \t 47 bits\n");
	seq_puts(m, "DMA Mask: \t 0x7fffffffffff\n");
	seq_printf(m, "Bus Location: \t %s\n", pci_name(pdev));
	seq_printf(m, "Device Minor: \t %d\n", gpu->minor);
	seq_printf(m, "GPU Firmware: \t %s\n", nvs_version());
	seq_puts(m, "GPU Excluded:\t No\n");
	return 0;
}

static int power_show(struct seq_file *m, void *v)
{
	nvs_ask_resource_manager();
	seq_puts(m, "Runtime D3 status:          ?\nVideo Memory:               ?\n\n");
	seq_puts(m, "GPU Hardware Support:\n Video Memory Self Refresh: ?\n Video Memory Off:          ?\n");
	return 0;
}

void nvs_proc_add(struct nvs_gpu *gpu)
{
	gpu->proc = proc_mkdir(pci_name(gpu->pdev), gpus);
	if (!gpu->proc)
		return;
	proc_create_single_data("information", 0444, gpu->proc, information_show, gpu);
	proc_create_single_data("power", 0444, gpu->proc, power_show, gpu);
	proc_create_single_data("registry", 0644, gpu->proc, registry_show, gpu);
}

void nvs_proc_remove(struct nvs_gpu *gpu)
{
	proc_remove(gpu->proc);
}

int nvs_proc_init(void)
{
	struct proc_dir_entry *caps, *mig;

	top = proc_mkdir("driver/nvidia", NULL);
	if (!top)
		return -ENOMEM;
	gpus = proc_mkdir("gpus", top);
	proc_create_single("version", 0444, top, version_show);
	proc_create_single("params", 0444, top, params_show);
	proc_create_single("registry", 0644, top, registry_show);
	proc_create_single("suspend", 0644, top, nothing_show);
	proc_create_single("suspend_depth", 0644, top, nothing_show);
	proc_create_single("README", 0444, proc_mkdir("warnings", top), nothing_show);
	proc_create_single("README", 0444, proc_mkdir("patches", top), nothing_show);
	caps = proc_mkdir("capabilities", top);
	proc_create_single("fabric-imex-mgmt", 0444, caps, nothing_show);
	mig = proc_mkdir("mig", caps);
	proc_create_single("config", 0444, mig, nothing_show);
	proc_create_single("monitor", 0444, mig, nothing_show);
	return 0;
}

void nvs_proc_exit(void)
{
	proc_remove(top);
}
